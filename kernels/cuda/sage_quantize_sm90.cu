// Quantizes for Hopper's kernel. Background: K's means and V's largest numbers are over all keys, so K and V are read
// twice, Q once. Approach: one launch; a cluster of blocks of threads has K or V of a head, adds it up, and quantizes it
// when all of them have; those that have Q fill what they leave. Sums are of stretches of keys, in an order that follows
// from the lengths alone. Rejected: atomic sums, which differ from run to run; three launches, for sums, sums of those,
// and numbers, which leave the device idle between them; Q in a launch beside (4 to 10 % slower).

#include "kernels/cuda/hopper_kernel.hpp"
#include "kernels/cuda/sage_quantize_launch_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

template <class... Types>
void queue(void (*kernel)(Types...), const OverlappingLaunch& launch, Types... arguments) {
  void* pointers[] = {&arguments...};
  launch_overlapping(reinterpret_cast<const void*>(kernel), launch, pointers, "quantize_sage");
}

template <class T, bool kAligned, int kLanes, int kKeys>
void quantize(Arguments a, int multiprocessors, void* stream) {
  a.ranks = a.stretches;
  // Where those of K and V are many, Q's find no place among them: half as many do better.
  const std::int64_t places = std::int64_t{multiprocessors} * kBlocksAtOnce<kLanes, kKeys>;
  if (a.ranks == kSageMostStretches && 2 * std::int64_t{a.heads} * a.ranks * 5 > 6 * places) a.ranks /= kMostStretches;
  constexpr int threads = kBlockThreads<kLanes>;
  queue(a.quantization.fp8_logits ? quantize_all<InCluster<true>, T, kLanes, kKeys, kAligned>
                                  : quantize_all<InCluster<false>, T, kLanes, kKeys, kAligned>,
        {quantizing_blocks(a, threads), threads, kTokenBytes<kLanes>, stream, a.ranks}, a);
  if (offsets_lse(a)) queue(offset_lse<T>, {offset_blocks(a.problem), kThreads, 0, stream}, a);
}

}  // namespace

void quantize_sage_sm90(const AttentionProblem& problem, const SageQuantization& quantization, const SageImages& images,
                        int multiprocessors, void* stream) {
  const Arguments arguments = quantizing_arguments(problem, quantization, images);
  if (problem.ranges != nullptr) queue(find_seen_keys, {problem.batch, 256, 0, stream}, problem, images.seen);
  for_inputs(problem, [&]<class T, bool kAligned>() {
    const auto is = [&](int channels, int keys) {
      return images.shape.channels == channels && images.shape.keys == keys;
    };
    if (is(64, 128)) return quantize<T, kAligned, 8, 128>(arguments, multiprocessors, stream);
    if (is(128, 128)) return quantize<T, kAligned, 16, 128>(arguments, multiprocessors, stream);
    if (is(128, 64)) return quantize<T, kAligned, 16, 64>(arguments, multiprocessors, stream);
    if (is(256, 64)) return quantize<T, kAligned, 32, 64>(arguments, multiprocessors, stream);
    refuse_shape();
  });
}

}  // namespace ditattn::kernels::cuda
