// A job of which one rank is lost on the way: killed, asleep, or thrown out. test_mpi_lost.py looks at how it ends.
// Usage: mpi_lost killed|asleep|throws|fine TIMEOUT

#include <ditattn/ditattn.hpp>
#include <ditattn/mpi.hpp>
#include <ditattn/parallel.hpp>
#include <fmt/format.h>

#include <csignal>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

namespace {

using namespace ditattn;
using namespace ditattn::parallel;

void get_lost(const std::string& how) {
  if (how == "killed") std::raise(SIGKILL);
  if (how == "asleep") std::this_thread::sleep_for(std::chrono::minutes(5));
  if (how == "throws") throw std::runtime_error("thrown out");
}

int run(const MpiSession& mpi, const std::string& how) {
  try {
    const auto group = std::make_shared<ParallelGroup>(mpi.world(), Mesh{.ring = mpi.world()->size()});
    const BackendClass backend = DiffusionAttentionBackendEnum::FLASH_ATTN.get_class();
    ParallelAttention layer(backend, {.num_heads = 2, .head_size = 64}, group);
    const Tensor tokens = empty({1, 100, 2, 64}, kFloat32);
    for (std::int64_t i = 0; i < tokens.numel(); ++i) static_cast<float*>(tokens.data_ptr())[i] = 0.5F;
    for (int call = 0; call < 20; ++call) {
      if (call == 10 && mpi.world()->rank() == 1) get_lost(how);
      layer.forward(tokens, tokens, tokens);
    }
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "mpi_lost: {}\n", error.what());
    mpi.world()->abort(error.what());
    return 1;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const MpiSession mpi(Seconds(std::atof(argv[2])));
  return run(mpi, argv[1]);
}
