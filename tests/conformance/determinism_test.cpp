// FLASH_ATTN's results are bit-identical from run to run, and whatever the number of threads, the rest of the batch and
// the other query rows.

#include <ditattn/ditattn.hpp>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>

namespace ditattn {
namespace {

constexpr std::int64_t kBatch = 3;
constexpr std::int64_t kRows = 333;
constexpr std::int64_t kKeys = 517;
constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kSize = 72;

Tensor random_tensor(std::initializer_list<std::int64_t> shape, std::uint64_t seed) {
  Tensor tensor = empty(shape, kFloat32);
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(tensor.data_ptr(), i, kFloat32, normal(generator));
  return tensor;
}

// Rows [first, first + count) of batch entry `entry`, in place.
Tensor slice(const Tensor& tensor, std::int64_t entry, std::int64_t first, std::int64_t count) {
  auto* data = static_cast<float*>(tensor.data_ptr()) + entry * tensor.stride(0) + first * tensor.stride(1);
  return wrap(data, {1, count, tensor.size(2), tensor.size(3)}, kFloat32,
              {tensor.stride(0), tensor.stride(1), tensor.stride(2), 1});
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.numel() == b.numel() &&
         std::memcmp(a.data_ptr(), b.data_ptr(), static_cast<std::size_t>(a.numel()) * sizeof(float)) == 0;
}

class Determinism : public testing::Test {
 protected:
  Tensor query = random_tensor({kBatch, kRows, kHeads, kSize}, 1);
  Tensor key = random_tensor({kBatch, kKeys, kHeads / 2, kSize}, 2);
  Tensor value = random_tensor({kBatch, kKeys, kHeads / 2, kSize}, 3);
  std::unique_ptr<AttentionImpl> attention = DiffusionAttentionBackendEnum::FLASH_ATTN.get_class()->make(
      {.num_heads = kHeads, .head_size = kSize, .num_kv_heads = kHeads / 2});
  Tensor whole = attention->forward(query, key, value);

  void TearDown() override { set_num_threads(0); }
};

TEST_F(Determinism, FromRunToRunAndForAnyThreadCount) {
  for (const int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    EXPECT_TRUE(same_bits(attention->forward(query, key, value), whole)) << threads << " threads";
  }
}

TEST_F(Determinism, ForAnyBatch) {
  for (std::int64_t entry = 0; entry < kBatch; ++entry) {
    const Tensor alone =
        attention->forward(slice(query, entry, 0, kRows), slice(key, entry, 0, kKeys), slice(value, entry, 0, kKeys));
    EXPECT_TRUE(same_bits(alone, slice(whole, entry, 0, kRows))) << "batch entry " << entry;
  }
}

TEST_F(Determinism, ForAnyOtherRows) {
  for (const std::int64_t first : {0, 1, 100, 332}) {
    const std::int64_t count = std::min<std::int64_t>(57, kRows - first);
    const Tensor part =
        attention->forward(slice(query, 1, first, count), slice(key, 1, 0, kKeys), slice(value, 1, 0, kKeys));
    EXPECT_TRUE(same_bits(part, slice(whole, 1, first, count))) << "rows from " << first;
  }
}

}  // namespace
}  // namespace ditattn
