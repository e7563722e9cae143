// Quantizes for the kernels for mma.sync, as sage_quantize_sm90.cu does, on GPUs without clusters: one launch adds up
// stretches of K and V, the next quantizes. Numbers are the same.

#include "kernels/cuda/sage_quantize_launch_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr const char* kName = "quantize_sage";

template <class T, bool kAligned, int kLanes, int kKeys>
void quantize(Arguments a, void* stream) {
  a.ranks = a.stretches;
  constexpr int threads = kBlockThreads<kLanes>;
  if (a.heads != 0) {
    queue(add_up_all<T, kLanes, kKeys, kAligned>, 2 * std::int64_t{a.heads} * a.stretches, threads, kTokenBytes<kLanes>,
          stream, kName, a);
  }
  queue(quantize_all<InTwoLaunches, T, kLanes, kKeys, kAligned>, quantizing_blocks(a, threads), threads,
        kTokenBytes<kLanes>, stream, kName, a);
  if (offsets_lse(a)) queue(offset_lse<T>, offset_blocks(a.problem), kThreads, 0, stream, kName, a);
}

}  // namespace

void quantize_sage_sm80(const AttentionProblem& problem, const SageQuantization& quantization, const SageImages& images,
                        void* stream) {
  const Arguments arguments = quantizing_arguments(problem, quantization, images);
  if (problem.ranges != nullptr) queue(find_seen_keys, problem.batch, 256, 0, stream, kName, problem, images.seen);
  for_inputs(problem, [&]<class T, bool kAligned>() {
    if (images.shape.keys != 64) refuse_shape();
    switch (images.shape.channels) {
      case 64:
        return quantize<T, kAligned, 8, 64>(arguments, stream);
      case 128:
        return quantize<T, kAligned, 16, 64>(arguments, stream);
      default:
        return quantize<T, kAligned, 32, 64>(arguments, stream);
    }
  });
}

}  // namespace ditattn::kernels::cuda
