#include "parallel/group.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <iterator>

#include "core/cuda_driver.hpp"

namespace ditattn::parallel {
namespace {

using Degrees = std::array<int, 3>;

Degrees degrees_of(const Mesh& mesh) { return {mesh.ulysses, mesh.ring, mesh.allgather}; }

std::string degrees_that_work(int ranks) {
  std::vector<std::string> names;
  for (const Mesh& mesh : meshes_of(ranks)) {
    if (mesh.allgather == 1) names.push_back(mesh_name(mesh));
  }
  return fmt::format("{} (allgather in the place of ring)", fmt::join(names, "; "));
}

void check_mesh(const Mesh& mesh, int ranks) {
  for (int degree : degrees_of(mesh)) {
    if (degree >= 1 && degree <= ranks) continue;
    throw ValueError(
        fmt::format("A degree of {} among {} ranks. Degrees that work: {}.", degree, ranks, degrees_that_work(ranks)));
  }
  if (mesh.ring > 1 && mesh.allgather > 1) {
    throw ValueError(fmt::format("ring={} and allgather={} exclude each other. Degrees that work: {}.", mesh.ring,
                                 mesh.allgather, degrees_that_work(ranks)));
  }
  const std::int64_t product = std::int64_t{mesh.ulysses} * mesh.second();
  if (product != ranks) {
    throw ValueError(fmt::format("{} takes {} ranks, there are {}. Degrees that work: {}.", mesh_name(mesh), product,
                                 ranks, degrees_that_work(ranks)));
  }
}

// The same error on every rank, whichever is wrong.
void check_same_mesh(Communicator& communicator, const Mesh& mesh) {
  const Degrees mine = degrees_of(mesh);
  std::vector<Degrees> all(static_cast<std::size_t>(communicator.size()));
  communicator.all_gather(mine.data(), all.data(), std::vector<std::int64_t>(all.size(), sizeof(mine)))->wait();
  for (std::size_t rank = 1; rank < all.size(); ++rank) {
    if (all[rank] == all[0]) continue;
    const auto name = [](const Degrees& degrees) { return mesh_name({degrees[0], degrees[1], degrees[2]}); };
    throw ValueError(
        fmt::format("Ranks differ in their mesh: rank 0 has {}, rank {} has {}.", name(all[0]), rank, name(all[rank])));
  }
}

std::string_view trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(' ');
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(' ') - first + 1);
}

}  // namespace

std::string mesh_name(const Mesh& mesh) {
  constexpr std::array names_of_degrees = {"ulysses", "ring", "allgather"};
  std::vector<std::string> parts;
  for (std::size_t i = 0; i < names_of_degrees.size(); ++i) {
    if (degrees_of(mesh)[i] != 1) parts.push_back(fmt::format("{}={}", names_of_degrees[i], degrees_of(mesh)[i]));
  }
  return parts.empty() ? "1 rank" : fmt::format("{}", fmt::join(parts, ", "));
}

Mesh parse_mesh(std::string_view text) {
  Mesh mesh;
  if (text == mesh_name(mesh)) return mesh;
  for (std::string_view rest = text; !rest.empty();) {
    const auto comma = rest.find(',');
    const std::string_view part = trimmed(rest.substr(0, comma));
    rest = comma == std::string_view::npos ? "" : rest.substr(comma + 1);
    const auto equals = part.find('=');
    const std::string_view name = trimmed(part.substr(0, equals));
    const std::string_view number = equals == std::string_view::npos ? "" : trimmed(part.substr(equals + 1));
    int* degree = name == "ulysses" ? &mesh.ulysses : name == "ring" ? &mesh.ring : nullptr;
    if (name == "allgather") degree = &mesh.allgather;
    int value = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), value);
    if (degree == nullptr || error != std::errc() || end != number.data() + number.size() || value < 1 ||
        *degree != 1) {
      throw ValueError(fmt::format(
          "'{}' in '{}' is no degree. Give ulysses=N, ring=N, allgather=N, each once, commas between, N from 1.", part,
          text));
    }
    *degree = value;
  }
  return mesh;
}

std::vector<Mesh> meshes_of(int ranks) {
  std::vector<Mesh> meshes;
  for (int ulysses = ranks; ulysses >= 1; --ulysses) {
    if (ranks % ulysses != 0) continue;
    meshes.push_back({.ulysses = ulysses, .ring = ranks / ulysses});
    if (ulysses < ranks) meshes.push_back({.ulysses = ulysses, .allgather = ranks / ulysses});
  }
  return meshes;
}

std::vector<std::int64_t> balanced_lengths(std::int64_t tokens, int ranks) {
  if (tokens < 0 || ranks < 1) throw ValueError(fmt::format("{} tokens cannot be shared by {} ranks.", tokens, ranks));
  std::vector<std::int64_t> lengths;
  lengths.reserve(static_cast<std::size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank) lengths.push_back(share(tokens, ranks, rank).size());
  return lengths;
}

void Workspace::use(DLDevice device, Communicator& communicator) {
  communicator_ = &communicator;
  if (device.device_type != device_.device_type || device.device_id != device_.device_id) {
    if (captured_) std::ranges::copy_if(memory_, std::back_inserter(of_graphs_), &Tensor::defined);
    memory_ = {};
    device_ = device;
  }
  captured_ = captured_ || cuda::is_captured(device);
}

char* Workspace::get(Slot slot, std::int64_t bytes, int part) {
  Tensor& memory = memory_[static_cast<std::size_t>(slot) * kMostParts + static_cast<std::size_t>(part)];
  if (!memory.defined() || memory.numel() < bytes) {
    if (captured_ && memory.defined()) of_graphs_.push_back(memory);
    memory = Tensor();  // freed first
    memory = communicator_->receive_memory(bytes, device_);
  }
  return static_cast<char*>(memory.data_ptr());
}

ParallelGroup::ParallelGroup(std::shared_ptr<Communicator> communicator, Mesh mesh)
    : state_(std::make_unique<GroupState>()) {
  check_same_mesh(*communicator, mesh);
  check_mesh(mesh, communicator->size());
  const int first = communicator->rank() % mesh.ulysses;
  const int second = communicator->rank() / mesh.ulysses;
  const auto part = [&](int size, int colour, int key) {
    if (size == communicator->size()) return communicator;
    if (size == 1) return ThreadWorld(1, communicator->timeout()).communicator(0);  // nothing goes through it
    return communicator->split(colour, key);
  };
  state_->ulysses = part(mesh.ulysses, second, first);
  state_->second = part(mesh.second(), first, second);
  state_->mesh = mesh;
  state_->all = std::move(communicator);
}

ParallelGroup::~ParallelGroup() = default;
const Mesh& ParallelGroup::mesh() const { return state_->mesh; }
Communicator& ParallelGroup::communicator() const { return *state_->all; }

}  // namespace ditattn::parallel
