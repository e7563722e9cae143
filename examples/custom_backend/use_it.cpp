// Calls the plug-in by name, once as CUSTOM and once as a member of its own, and checks both against a softmax written
// out below. Exits with 1 where they differ.

#include <ditattn/ditattn.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

using namespace ditattn;

constexpr std::int64_t kRows = 7;
constexpr std::int64_t kKeys = 9;
constexpr std::int64_t kVisible = 6;  // keys that the padding mask leaves
constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kKvHeads = 2;
constexpr std::int64_t kSize = 24;
constexpr const char* kClassPath = "acme.attention.OnlineSoftmaxBackend";

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

Tensor random_tensor(std::initializer_list<std::int64_t> shape, std::uint32_t seed) {
  Tensor tensor = empty(shape, kFloat32);
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::generate_n(floats(tensor), tensor.numel(), [&] { return normal(generator); });
  return tensor;
}

struct Inputs {
  Tensor query = random_tensor({1, kRows, kHeads, kSize}, 1);
  Tensor key = random_tensor({1, kKeys, kKvHeads, kSize}, 2);
  Tensor value = random_tensor({1, kKeys, kKvHeads, kSize}, 3);
  Tensor mask = empty({1, kKeys}, kBool);
  Inputs() {
    for (int j = 0; j < kKeys; ++j) static_cast<bool*>(mask.data_ptr())[j] = j < kVisible;
  }
};

// Element d of softmax(q · kᵀ / √D) · v for one row of one head, in two passes and float64.
double expected(const Inputs& in, std::int64_t row, std::int64_t head, std::int64_t d) {
  const std::int64_t kv_head = head / (kHeads / kKvHeads);
  std::vector<double> weights(kVisible);
  double total = 0;
  double sum = 0;
  for (std::int64_t j = 0; j < kVisible; ++j) {
    double logit = 0;
    for (std::int64_t i = 0; i < kSize; ++i) {
      logit += static_cast<double>(floats(in.query)[(row * kHeads + head) * kSize + i]) *
               floats(in.key)[(j * kKvHeads + kv_head) * kSize + i];
    }
    weights[j] = std::exp(logit / std::sqrt(static_cast<double>(kSize)));
    total += weights[j];
  }
  for (std::int64_t j = 0; j < kVisible; ++j)
    sum += weights[j] * floats(in.value)[(j * kKvHeads + kv_head) * kSize + d];
  return sum / total;
}

double largest_error(const Inputs& in, const Tensor& out) {
  double largest = 0;
  for (std::int64_t i = 0; i < out.numel(); ++i) {  // over (row, head, d)
    const double error = std::abs(floats(out)[i] - expected(in, i / kSize / kHeads, i / kSize % kHeads, i % kSize));
    if (!(error <= largest)) largest = error;  // NaN too
  }
  return largest;
}

bool is_right(DiffusionAttentionBackendEnum member) {
  const Inputs in;
  const auto attention = member.get_class()->make({.num_heads = kHeads, .head_size = kSize, .num_kv_heads = kKvHeads});
  const Tensor out = attention->forward(in.query, in.key, in.value, AttentionMetadata({.attn_mask = in.mask}));
  const double error = largest_error(in, out);
  std::printf("%s: %s, largest error %.1e\n", member.name().c_str(), attention->backend().capabilities().engine.c_str(),
              error);
  return error < 1e-6;
}

int use() {
  // CUSTOM waits for a class path of yours; `define` adds a member. Any other member can be overridden as CUSTOM is.
  register_diffusion_backend(DiffusionAttentionBackendEnum::CUSTOM, kClassPath);
  const auto mine = DiffusionAttentionBackendEnum::define("MY_ATTN", kClassPath);
  const bool right = is_right(DiffusionAttentionBackendEnum::CUSTOM) && is_right(mine);

  // A head size it does not declare is an error that says so, not a wrong result.
  const Tensor wide = random_tensor({1, 1, 1, 512}, 4);
  try {
    mine.get_class()->make({.num_heads = 1, .head_size = 512})->forward(wide, wide, wide);
  } catch (const ValueError& error) {
    std::printf("refused: %s\n", error.message().c_str());
    return right ? 0 : 1;
  }
  std::puts("head size 512 was not refused");
  return 1;
}

}  // namespace

int main() {
  try {
    return use();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "use_it: %s\n", error.what());
    return 1;
  }
}
