// What GPUs add to parallel attention: token kernels against the host's, graphs, host memory over NCCL, ranks that do
// not come. nccl_lost has those that are lost in the middle or fail, in processes of their own: after a communicator
// has been aborted NCCL's next operations in a process may hang.

#include <cuda_runtime.h>
#include <ditattn/cuda.hpp>
#include <ditattn/nccl.hpp>
#include <dlfcn.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nccl.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "kernels/cuda/peer_exchange.hpp"
#include "parallel/merge.hpp"
#include "parallel/tokens.hpp"
#include "tests/parallel/ranks.hpp"

namespace ditattn::parallel::testing {
namespace {

constexpr DLDevice kGpu{kDLCUDA, 0};

// A stream, and this thread's work in it, for longer than the tensors made meanwhile.
class InStream {
 public:
  explicit InStream(DLDevice device) : device_(device) {
    cudaSetDevice(device.device_id);
    cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    TVMFFIEnvSetStream(device.device_type, device.device_id, stream_, &before_);
  }
  ~InStream() {
    cudaStreamSynchronize(stream_);
    TVMFFIEnvSetStream(device_.device_type, device_.device_id, before_, nullptr);
    cudaStreamDestroy(stream_);
  }
  InStream(const InStream&) = delete;
  InStream& operator=(const InStream&) = delete;
  [[nodiscard]] cudaStream_t get() const { return stream_; }

 private:
  DLDevice device_;
  cudaStream_t stream_ = nullptr;
  TVMFFIStreamHandle before_ = nullptr;
};

class Random {
 public:
  explicit Random(std::uint64_t seed) : generator_(seed) {}
  std::int64_t number(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(generator_);
  }
  Tensor normal(std::initializer_list<std::int64_t> shape, DLDataType dtype) {
    Tensor tensor = empty(shape, dtype);
    for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(tensor.data_ptr(), i, dtype, normal_(generator_));
    return tensor;
  }

 private:
  std::mt19937_64 generator_;
  std::normal_distribution<double> normal_;
};

double largest_difference(const Tensor& a, const Tensor& b) {
  double largest = 0;
  for (std::int64_t i = 0; i < a.numel(); ++i) {
    const double x = load_element(a.data_ptr(), i, a.dtype());
    const double y = load_element(b.data_ptr(), i, b.dtype());
    if (x != y && !(std::isnan(x) && std::isnan(y))) largest = std::max(largest, std::abs(x - y));
    if (std::isnan(x) != std::isnan(y)) return INFINITY;
  }
  return largest;
}

// Rows of any sizes, whole tensors and slices of them, LSEs of −∞, ∞ and NaN among them.
TEST(TokenKernels, DoWhatTheHostDoes) {
  const std::uint64_t seed = std::random_device()();
  Random random(seed);
  SCOPED_TRACE(fmt::format("seed {}", seed));
  double worst = 0;
  for (int trial = 0; trial < 60; ++trial) {
    const DLDataType dtype = std::array{kFloat32, kFloat16, kBFloat16}[static_cast<std::size_t>(trial % 3)];
    const std::int64_t batch = random.number(1, 3);
    const std::int64_t tokens = random.number(0, 70);
    const std::int64_t heads = random.number(1, 5);
    const std::int64_t size = std::array<std::int64_t, 6>{128, 64, 1, 37, 72, 40}[static_cast<std::size_t>(trial % 6)];
    SCOPED_TRACE(fmt::format("({}, {}, {}, {}) {}", batch, tokens, heads, size, dtype_name(dtype)));
    const Range some = {.begin = random.number(0, heads - 1), .end = heads};
    const Tensor part = random.normal({batch, tokens, heads, size}, dtype);
    const Tensor part_lse = random.normal({batch, tokens, heads, 1}, kFloat32);
    const Tensor out = random.normal({batch, tokens, heads, size}, kFloat32);
    const Tensor lse = random.normal({batch, tokens, heads, 1}, kFloat32);
    for (std::int64_t i = 0; i < lse.numel(); ++i) {
      const std::array odd = {-INFINITY, INFINITY, NAN};
      if (i % 5 == 0) store_element(lse.data_ptr(), i, kFloat32, odd[static_cast<std::size_t>(random.number(0, 2))]);
      if (i % 7 == 0)
        store_element(part_lse.data_ptr(), i, kFloat32, odd[static_cast<std::size_t>(random.number(0, 2))]);
    }
    const auto run = [&](DLDevice device) {
      const auto fresh = [&](const Tensor& tensor) { return copy_to(tensor, device); };
      const Part whole{.out = fresh(out), .lse = fresh(lse)};
      const Part other{.out = fresh(part), .lse = fresh(part_lse)};
      const Part rounded{.out = fresh(part), .lse = fresh(lse)};
      const Part zero{.out = fresh(out), .lse = fresh(lse)};
      const Tensor converted = fresh(part);
      const Tensor copied = fresh(part);
      const auto some_of = [&](const Part& all) {
        return Part{.out = slice(all.out, 2, some), .lse = slice(all.lse, 2, some)};
      };
      merge(some_of(whole), some_of(whole), some_of(other));
      merge(some_of(rounded), some_of(other), some_of(other));
      convert(slice(converted, 2, some), slice(whole.out, 2, some));
      clear(some_of(zero));
      const Range first{.begin = 0, .end = tokens / 2};
      const Range last{.begin = tokens - tokens / 2, .end = tokens};
      copy(slice(slice(copied, 1, first), 2, some), slice(slice(other.out, 1, last), 2, some));
      std::vector<Tensor> results;
      for (const Tensor& result :
           {copied, zero.out, zero.lse, whole.out, whole.lse, converted, rounded.out, rounded.lse}) {
        results.push_back(on(kCpu, result));
      }
      return results;
    };
    const auto host = run(kCpu);
    const auto gpu = run(kGpu);
    for (const std::size_t exact : {0, 1, 2}) EXPECT_TRUE(same_bits(host[exact], gpu[exact])) << exact;
    for (const std::size_t single : {3, 4, 7}) EXPECT_LE(largest_difference(host[single], gpu[single]), 2e-6);
    const double rounding = dtype == kFloat32 ? 2e-6 : dtype == kFloat16 ? 4e-3 : 4e-2;
    for (const std::size_t rounded : {5, 6}) EXPECT_LE(largest_difference(host[rounded], gpu[rounded]), rounding);
    worst = std::max(worst, largest_difference(host[3], gpu[3]));
  }
  std::cout << fmt::format("token kernels: largest difference {:.1e}\n", worst);
}

// Two ranks on one GPU, in a stream each: more copies than a launch takes, few and none, with a peer and without.
TEST(TokenKernels, ExchangeBetweenTwoRanks) {
  namespace cuda = kernels::cuda;
  const DLDevice gpu = kGpu;
  const std::uint64_t seed = std::random_device()();
  Random random(seed);
  SCOPED_TRACE(fmt::format("seed {}", seed));
  const Tensor memory = empty(std::array{3 * std::int64_t{cuda::kPeerWordsBytes}}, kBool, gpu);
  ASSERT_EQ(cudaMemset(memory.data_ptr(), 0, 3 * cuda::kPeerWordsBytes), cudaSuccess);
  const auto words_of = [&](std::size_t rank) {
    return reinterpret_cast<std::uint32_t*>(static_cast<char*>(memory.data_ptr()) + rank * cuda::kPeerWordsBytes);
  };
  const InStream streams[] = {InStream(gpu), InStream(gpu)};
  // Kernels are loaded when they are first launched, which waits for those that run: here for one of this very thread.
  for (const std::int64_t size : {16, 6, 3}) {
    const Tensor rows = on(gpu, random.normal({1, 2, 1, size}, kBFloat16));
    cuda::RowCopy same{.to = rows.data_ptr(),
                       .from = rows.data_ptr(),
                       .to_strides = {.batch = 2 * size, .token = size, .head = size},
                       .from_strides = {.batch = 2 * size, .token = size, .head = size},
                       .shape = {.batch = 1, .tokens = 2, .heads = 1, .head_size = size},
                       .element_bytes = 2};
    const cuda::PeerWords words{.here = words_of(0), .poison = words_of(2), .rank = 0};
    const cuda::Launch launch{.device = gpu.device_id, .stream = streams[0].get()};
    cuda::exchange_rows({}, {&same, 1}, words, 0, 0, launch);
    cuda::await_rows(words, 0, launch);
  }
  struct Checked {
    Tensor to;
    Tensor from;
  };
  for (int trial = 0; trial < 40; ++trial) {
    SCOPED_TRACE(trial);
    std::vector<Checked> checked;
    std::array<std::vector<cuda::RowCopy>, 2> there;
    std::array<std::vector<cuda::RowCopy>, 2> here;
    const auto draw = [&](std::int64_t most, std::vector<cuda::RowCopy>& copies) {
      for (std::int64_t count = random.number(0, most); count > 0; --count) {
        const std::int64_t heads = random.number(1, 6);
        const std::int64_t size =
            std::array<std::int64_t, 4>{128, 64, 37, 40}[static_cast<std::size_t>(random.number(0, 3))];
        const Tensor host = random.normal({random.number(1, 2), random.number(1, 300), heads, size}, kBFloat16);
        const Range some{random.number(0, heads - 1), heads};
        const Tensor from = on(gpu, host);
        const Tensor to = on(gpu, random.normal({host.size(0), host.size(1), some.size(), size}, kBFloat16));
        checked.push_back({.to = to, .from = from});
        copies.push_back({.to = to.data_ptr(),
                          .from = static_cast<char*>(from.data_ptr()) + 2 * some.begin * size,
                          .to_strides = {.batch = to.stride(0), .token = to.stride(1), .head = to.stride(2)},
                          .from_strides = {.batch = from.stride(0), .token = from.stride(1), .head = from.stride(2)},
                          .shape = {.batch = to.size(0), .tokens = to.size(1), .heads = to.size(2), .head_size = size},
                          .element_bytes = 2});
      }
    };
    for (std::size_t rank = 0; rank < 2; ++rank) {
      draw(trial % 4 == 0 ? 80 : 5, there[rank]);
      draw(trial % 4 == 1 ? 80 : 5, here[rank]);
    }
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    for (std::size_t rank = 0; rank < 2; ++rank) {
      cuda::PeerWords words{.here = words_of(rank), .poison = words_of(2), .rank = static_cast<int>(rank)};
      words.there[1 - rank] = words_of(1 - rank);
      const std::uint64_t other = std::uint64_t{1} << (1 - rank);
      const std::uint64_t to = there[rank].empty() ? 0 : other;
      const std::uint64_t from = there[1 - rank].empty() ? 0 : other;
      const cuda::Launch launch{.device = gpu.device_id, .stream = streams[rank].get()};
      cuda::exchange_rows(there[rank], here[rank], words, to, from, launch);
      cuda::await_rows(words, from, launch);
    }
    for (const InStream& stream : streams) ASSERT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
    for (const auto& [to, from] : checked) {
      const Tensor whole = on(kCpu, from);
      const Tensor expected = empty({to.size(0), to.size(1), to.size(2), to.size(3)}, kBFloat16);
      copy(expected, slice(whole, 2, {whole.size(2) - to.size(2), whole.size(2)}));
      EXPECT_TRUE(same_bits(on(kCpu, to), expected));
    }
  }
  // What nobody is ready for ends with the poison.
  const std::uint32_t poison = cuda::kPeerPoison;
  ASSERT_EQ(cudaMemcpy(words_of(2), &poison, sizeof(poison), cudaMemcpyHostToDevice), cudaSuccess);
  cuda::PeerWords words{.here = words_of(0), .poison = words_of(2), .rank = 0};
  words.there[1] = words_of(1);
  const cuda::Launch launch{.device = gpu.device_id, .stream = streams[0].get()};
  cuda::exchange_rows({}, {}, words, 2, 0, launch);
  cuda::await_rows(words, 2, launch);
  EXPECT_EQ(cudaStreamSynchronize(streams[0].get()), cudaSuccess);
}

TEST(Nccl, RefusesRanksAndDevicesThatAreNotThere) {
  if (!ranks().is_first) GTEST_SKIP();
  const NcclId id = nccl_id();
  EXPECT_THROW(nccl_communicator(id, 2, 2, 0), ValueError);
  EXPECT_THROW(nccl_communicator(id, 0, 1, 99), ValueError);
  EXPECT_THROW(nccl_communicator(nullptr), ValueError);
  EXPECT_THROW(nccl_communicator(std::filesystem::path("/no/such/folder/id"), 0, 1, 0), FileError);
}

TEST(Nccl, RefusesAWordForPeerCopiesThatIsNone) {
  const char* before = std::getenv("DITATTN_PEER_COPIES");
  const std::string kept = before != nullptr ? before : "";
  ::setenv("DITATTN_PEER_COPIES", "perhaps", 1);
  EXPECT_THROW(nccl_communicator(NcclId{}, 0, 1, 0), ValueError);
  ::setenv("DITATTN_PEER_COPIES", kept.c_str(), 1);  // empty: not set
}

TEST(Nccl, ARankThatDoesNotComeIsATimeout) {
  if (!ranks().is_first) GTEST_SKIP();
  const auto start = std::chrono::steady_clock::now();
  EXPECT_THROW(nccl_communicator(nccl_id(), 0, 2, 0, Seconds(2)), TimeoutError);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  EXPECT_THROW(nccl_communicator(std::filesystem::path(::testing::TempDir()) / "no_rank_0", 1, 2, 0, Seconds(1)),
               TimeoutError);
}

TEST(Nccl, OneRankOnOneGpuComputes) {
  if (!ranks().is_first) GTEST_SKIP();
  const auto communicator = nccl_communicator(nccl_id(), 0, 1, 0);
  const auto group = std::make_shared<ParallelGroup>(communicator, Mesh{});
  std::vector<char> bytes = {1, 2, 3};
  std::vector<char> came(3);
  communicator->all_gather(bytes.data(), came.data(), std::vector<std::int64_t>{3})->wait();
  EXPECT_EQ(bytes, came);
}

class OverNccl : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!ranks().are_over_nccl) GTEST_SKIP() << "needs --ranks=nccl";
  }
};

TEST_F(OverNccl, CarriesHostMemoryOfAnySize) {
  for (int size : ranks().sizes) {
    ranks().run(size, [&](const std::shared_ptr<Communicator>& communicator) {
      std::vector<std::int64_t> sent, received;
      for (int peer = 0; peer < size; ++peer) {
        sent.push_back(1000 * communicator->rank() + 7 * peer);
        received.push_back(1000 * peer + 7 * communicator->rank());
      }
      const auto total = [](const auto& of) {
        return static_cast<std::size_t>(std::accumulate(of.begin(), of.end(), std::int64_t{0}));
      };
      std::vector<char> out(total(sent), static_cast<char>(communicator->rank() + 1));
      std::vector<char> in(total(received));
      communicator->all_to_all(out.data(), sent, in.data(), received)->wait();
      std::size_t at = 0;
      for (int peer = 0; peer < size; ++peer) {
        for (std::int64_t i = 0; i < received[static_cast<std::size_t>(peer)]; ++i) ASSERT_EQ(in[at++], peer + 1);
      }
      communicator->barrier();
    });
  }
}

// The bytes of block `index` from one rank to another.
std::vector<char> message(int trial, int from, int to, std::size_t index, std::int64_t bytes) {
  std::mt19937 generator(static_cast<unsigned>(((trial * 100 + from) * 100 + to) * 100) + static_cast<unsigned>(index));
  std::vector<char> text(static_cast<std::size_t>(bytes));
  for (char& letter : text) letter = static_cast<char>(generator());
  return text;
}

// Many blocks between any two ranks, in the transport's memory and in other memory, of which several batches are under
// way.
TEST_F(OverNccl, CarriesDeviceMemoryOfAnySize) {
  const int size = ranks().sizes.back();
  ranks().run(size, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank();
    const DLDevice device = ranks().device(rank);
    const InStream in_stream(device);
    Random random(11);  // the same on all ranks
    struct Received {
      Tensor memory;
      std::int64_t offset;
      std::vector<char> expected;
    };
    std::vector<Tensor> sent;
    std::vector<Received> received;
    std::vector<std::unique_ptr<Pending>> pending;
    std::int64_t wrong = 0;
    std::int64_t total = 0;
    for (int trial = 0; trial < 60; ++trial) {
      std::vector<SendBlock> sends;
      std::vector<ReceiveBlock> receives;
      for (int from = 0; from < size; ++from) {
        for (int to = 0; to < size; ++to) {
          const std::int64_t blocks = trial % 10 == 9 ? 40 : random.number(0, 3);
          for (std::size_t index = 0; index < static_cast<std::size_t>(blocks); ++index) {
            const std::int64_t largest = random.number(0, 20) == 0 ? 3'000'000 : 5'000;
            const std::int64_t bytes = random.number(blocks > 3 ? 1 : 0, largest);
            const std::int64_t offset = random.number(0, 40);
            const bool is_own = random.number(0, 3) > 0;
            if (from == rank) {
              const auto text = message(trial, from, to, index, bytes);
              const Tensor host = empty({bytes}, kBool);
              std::copy(text.begin(), text.end(), static_cast<char*>(host.data_ptr()));
              sent.push_back(copy_to(host, device));
              if (bytes > 0) sends.push_back({to, sent.back().data_ptr(), bytes});
            }
            if (to == rank) {
              const Tensor memory = is_own ? communicator->receive_memory(offset + bytes, device)
                                           : empty(std::array{offset + bytes}, kBool, device);
              received.push_back({memory, offset, message(trial, from, to, index, bytes)});
              if (bytes > 0) receives.push_back({from, static_cast<char*>(memory.data_ptr()) + offset, bytes});
            }
          }
        }
      }
      pending.push_back(communicator->start(Operation::all_to_all, sends, receives, device));
      if (trial % 3 != 2) continue;
      for (auto& one : pending) one->wait();
      for (const Received& one : received) {
        const Tensor host = on(kCpu, one.memory);
        total += static_cast<std::int64_t>(one.expected.size());
        wrong +=
            std::equal(one.expected.begin(), one.expected.end(), static_cast<const char*>(host.data_ptr()) + one.offset)
                ? 0
                : 1;
      }
      sent.clear();
      received.clear();
      pending.clear();
    }
    communicator->throw_if_failed();
    EXPECT_EQ(wrong, 0);
    EXPECT_GT(total, 0);
    communicator->barrier();
  });
}

TEST_F(OverNccl, GroupsThatAreSplitCarryBytesToo) {
  const int size = ranks().sizes.back();
  ranks().run(size, [&](const std::shared_ptr<Communicator>& communicator) {
    const int rank = communicator->rank();
    const DLDevice device = ranks().device(rank);
    for (int round = 0; round < 3; ++round) {
      const auto reversed = communicator->split(0, -rank);
      ASSERT_EQ(reversed->rank(), size - 1 - rank);
      const std::int64_t bytes = 100'000 + round;
      const Tensor mine = copy_to(wrap(message(round, rank, 0, 0, bytes).data(), {bytes}, kBool), device);
      const Tensor all = reversed->receive_memory(size * bytes, device);
      reversed->all_gather(mine.data_ptr(), all.data_ptr(), std::vector<std::int64_t>(std::size_t(size), bytes), device)
          ->wait();
      const Tensor host = on(kCpu, all);
      for (int from = 0; from < size; ++from) {
        const auto expected = message(round, size - 1 - from, 0, 0, bytes);
        EXPECT_TRUE(std::equal(expected.begin(), expected.end(), static_cast<char*>(host.data_ptr()) + from * bytes));
      }
    }
    communicator->throw_if_failed();
    communicator->barrier();
  });
}

// As a program's own: NCCL's functions as it would have them.
struct Nccl {
  decltype(&ncclCommInitRank) init = nullptr;
  decltype(&ncclCommDestroy) destroy = nullptr;
  Nccl() {
    void* library = ::dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    init = reinterpret_cast<decltype(init)>(::dlsym(library, "ncclCommInitRank"));
    destroy = reinterpret_cast<decltype(destroy)>(::dlsym(library, "ncclCommDestroy"));
  }
};

TEST_F(OverNccl, TheProgramsOwnCommunicatorGivesTheSameBits) {
  const int size = ranks().sizes.back();
  ranks().run(size, [&](const std::shared_ptr<Communicator>& world) {
    const Nccl nccl;
    const int rank = world->rank();
    const DLDevice device = ranks().device(rank);
    const InStream in_stream(device);
    const NcclId mine = rank == 0 ? nccl_id() : NcclId{};
    NcclId id{};
    std::vector<std::int64_t> bytes(static_cast<std::size_t>(size), 0);
    bytes[0] = sizeof(id);
    world->all_gather(mine.data(), id.data(), bytes)->wait();
    ncclUniqueId unique;
    static_assert(sizeof(unique) == sizeof(id));
    std::memcpy(&unique, id.data(), sizeof(unique));
    ncclComm_t theirs = nullptr;
    ASSERT_EQ(nccl.init(&theirs, size, unique, rank), ncclSuccess);
    Random random(static_cast<std::uint64_t>(rank));
    const Tensor input = on(device, random.normal({1, 300, 8, 64}, kBFloat16));
    for (const Mesh& mesh : meshes_of(size)) {
      SCOPED_TRACE(mesh_name(mesh));
      const auto result = [&](const std::shared_ptr<Communicator>& communicator) {
        const auto group = std::make_shared<ParallelGroup>(communicator, mesh);
        const BackendClass backend = DiffusionAttentionBackendEnum::FLASH_ATTN.get_class();
        ParallelAttention layer(backend, {.num_heads = 8, .head_size = 64}, group);
        const Tensor out = on(kCpu, layer.forward(input, input, input));
        communicator->throw_if_failed();
        return out;
      };
      EXPECT_TRUE(same_bits(result(nccl_communicator(theirs)), result(world)));
    }
    world->barrier();
    EXPECT_EQ(nccl.destroy(theirs), ncclSuccess);
  });
}

// Of 50 calls, whose input changes between replays.
TEST_F(OverNccl, GraphsReplayWithTheSameBits) {
  Random random(7);
  const int size = ranks().sizes.back();
  for (const Mesh& mesh : meshes_of(size)) {
    SCOPED_TRACE(mesh_name(mesh));
    ranks().run(size, [&](const std::shared_ptr<Communicator>& communicator) {
      const int rank = communicator->rank();
      const DLDevice device = ranks().device(rank);
      const InStream in_stream(device);
      cudaStream_t stream = in_stream.get();
      const auto group = std::make_shared<ParallelGroup>(communicator, mesh);
      ParallelAttention layer(DiffusionAttentionBackendEnum::FLASH_ATTN.get_class(), {.num_heads = 8, .head_size = 64},
                              group);
      Random mine(static_cast<std::uint64_t>(rank));
      const Tensor input = on(device, mine.normal({1, 300, 8, 64}, kBFloat16));
      const Tensor other = on(device, mine.normal({1, 300, 8, 64}, kBFloat16));
      const Tensor out = copy_to(input, device);
      const auto call = [&] { layer.forward(input, input, input, {}, {.out = out}); };
      call();
      synchronize(device);
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t exec = nullptr;
      ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
      for (int i = 0; i < 50; ++i) call();
      ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
      ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
      for (int replay = 0; replay < 3; ++replay) {
        copy(input, replay % 2 == 0 ? other : on(device, mine.normal({1, 300, 8, 64}, kBFloat16)));
        ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
        const Tensor replayed = on(kCpu, out);
        call();
        EXPECT_TRUE(same_bits(replayed, on(kCpu, out)));
      }
      communicator->throw_if_failed();
      communicator->barrier();
      cudaGraphExecDestroy(exec);
      cudaGraphDestroy(graph);
    });
  }
}

}  // namespace
}  // namespace ditattn::parallel::testing
