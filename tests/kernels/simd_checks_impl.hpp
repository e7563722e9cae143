/// A level's vocabulary, word by word, NaN included. Included by one unit per level, after its simd_*.hpp; like the
/// kernels' units these have flags of their own and share nothing.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

using Vec = Simd::Vec;
constexpr int kWidth = Simd::kWidth;
constexpr float kInf = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

// The vector's lanes against what `expected(lane)` gives; NaN equals NaN.
template <class Expected>
bool equals(Vec v, Expected expected) {
  float lanes[kWidth];
  Simd::store(lanes, v);
  for (int i = 0; i < kWidth; ++i) {
    const float want = expected(i);
    if (lanes[i] != want && !(lanes[i] != lanes[i] && want != want)) return false;
  }
  return true;
}

// Lane i gets value(i).
template <class Value>
Vec make(Value value) {
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = value(i);
  return Simd::load(lanes);
}

// Numbers that differ per lane, −0 and both infinities among them.
float sample(int i) {
  constexpr float values[] = {0.5F, -2.25F, kInf, 3, -0.0F, -kInf, 1e-3F, -7};
  return values[i % 8];
}

bool selects() {
  const Vec a = make(&sample);
  const Vec b = make([](int i) { return sample(i + 3); });
  const Vec nan = Simd::set1(kNaN);
  const Vec x = make([](int i) { return 1.0F + static_cast<float>(i); });
  const Vec y = make([](int i) { return -1.0F - static_cast<float>(i); });
  const auto first = [](int i) { return 1.0F + static_cast<float>(i); };
  const auto second = [](int i) { return -1.0F - static_cast<float>(i); };
  return equals(Simd::select_less(a, b, x, y),
                [&](int i) { return sample(i) < sample(i + 3) ? first(i) : second(i); }) &&
         equals(Simd::select_less(a, a, x, y), second) && equals(Simd::select_less(nan, b, x, y), second) &&
         equals(Simd::select_less(a, nan, x, y), second) && equals(Simd::select_equal(a, a, x, y), first) &&
         equals(Simd::select_equal(nan, nan, x, y), second) &&
         equals(Simd::select_equal(Simd::set1(0), Simd::set1(-0.0F), x, nan), first);
}

bool maxima() {
  const Vec a = make(&sample);
  const Vec b = make([](int i) { return sample(i + 3); });
  const Vec nan = Simd::set1(kNaN);
  return equals(Simd::max(a, b), [](int i) { return sample(i) > sample(i + 3) ? sample(i) : sample(i + 3); }) &&
         equals(Simd::max(nan, b), [](int i) { return sample(i + 3); }) &&
         equals(Simd::max(a, nan), [](int /*i*/) { return kNaN; });
}

// Each lane alone must count.
bool any_lane() {
  const Vec a = make(&sample);
  if (Simd::any_not_equal(a, a) || Simd::any_nan(a)) return false;
  for (int lane = 0; lane < kWidth; ++lane) {
    const Vec nan = make([&](int i) { return i == lane ? kNaN : sample(i); });
    const Vec other = make([&](int i) { return i == lane ? 12 : sample(i); });
    if (!Simd::any_nan(nan) || !Simd::any_not_equal(nan, nan) || !Simd::any_not_equal(a, other)) return false;
  }
  return true;
}

bool arithmetic() {
  const auto left = [](int i) { return 1.5F + static_cast<float>(i); };
  const auto right = [](int i) { return 0.25F - static_cast<float>(2 * i); };
  const Vec a = make(left);
  const Vec b = make(right);
  return equals(Simd::add(a, b), [&](int i) { return left(i) + right(i); }) &&
         equals(Simd::sub(a, b), [&](int i) { return left(i) - right(i); }) &&
         equals(Simd::mul(a, b), [&](int i) { return left(i) * right(i); }) &&
         equals(Simd::div(a, b), [&](int i) { return left(i) / right(i); }) &&
         equals(Simd::fma(a, b, a), [&](int i) { return left(i) * right(i) + left(i); });
}

bool rounds_to_even() {
  const auto value = [](int i) { return 0.5F + static_cast<float>(i % 5) - (i % 2 == 0 ? 3.0F : 90.0F); };
  return equals(Simd::round(make(value)), [&](int i) { return __builtin_rintf(value(i)); }) &&
         equals(Simd::round(Simd::set1(-125.6F)), [](int /*i*/) { return -126.0F; });
}

bool splits_powers() {
  const auto value = [](int i) { return 0.25F * static_cast<float>(i % 7) - (i % 2 == 0 ? 3.0F : 90.0F); };
  return equals(Simd::fraction(make(value)), [&](int i) { return value(i) - __builtin_floorf(value(i)); }) &&
         equals(Simd::fraction(Simd::set1(-125.75F)), [](int /*i*/) { return 0.25F; }) &&
         equals(Simd::fraction(Simd::set1(kNaN)), [](int /*i*/) { return kNaN; });
}

bool scales_by_powers() {
  constexpr float fractions[] = {0, 0.5F, 0.875F};
  for (int n = -126; n <= 127; ++n) {
    for (const float fraction : fractions) {
      const float x = static_cast<float>(n) + (n < 127 ? fraction : 0);
      const Vec power = Simd::scale_by_power(Simd::set1(1.5F), Simd::set1(x));
      if (!equals(power, [&](int /*i*/) { return __builtin_ldexpf(1.5F, n); })) return false;
    }
  }
  const Vec lowest = Simd::set1(-__builtin_inff());
  const auto zero = [](int /*i*/) { return 0.0F; };
  if (Simd::kScalesByAll &&
      !(equals(Simd::fraction(lowest), zero) && equals(Simd::scale_by_power(Simd::set1(1), lowest), zero) &&
        equals(Simd::scale_by_power(Simd::set1(1), Simd::set1(-1e30F)), zero))) {
    return false;
  }
  return equals(Simd::scale_by_power(Simd::set1(kNaN), Simd::set1(kNaN)), [](int /*i*/) { return kNaN; });
}

bool loads_halves() {
  std::uint16_t halves[kWidth];
  for (int i = 0; i < kWidth; ++i) halves[i] = static_cast<std::uint16_t>(0x3C00 + i);  // 1 + i / 1024 as float16
  const bool f16 = equals(Simd::load_f16(halves), [](int i) { return 1 + static_cast<float>(i) / 1024; });
  for (int i = 0; i < kWidth; ++i) halves[i] = static_cast<std::uint16_t>(0xBF80 + i);  // −1 − i / 128 as bfloat16
  return f16 && equals(Simd::load_bf16(halves), [](int i) { return -1 - static_cast<float>(i) / 128; });
}

bool transposes() {
  Vec rows[kWidth];
  for (int r = 0; r < kWidth; ++r) rows[r] = make([&](int i) { return static_cast<float>(100 * r + i); });
  Simd::transpose(rows);
  for (int r = 0; r < kWidth; ++r) {
    if (!equals(rows[r], [&](int i) { return static_cast<float>(100 * i + r); })) return false;
  }
  return true;
}

// The first word that is wrong; null if none is.
const char* wrong_word() {
  if (!arithmetic()) return "add, sub, mul, div or fma";
  if (!maxima()) return "max";
  if (!selects()) return "select_less or select_equal";
  if (!any_lane()) return "any_not_equal or any_nan";
  if (!rounds_to_even()) return "round";
  if (!splits_powers()) return "fraction";
  if (!scales_by_powers()) return "scale_by_power";
  if (!loads_halves()) return "load_f16 or load_bf16";
  return transposes() ? nullptr : "transpose";
}

}  // namespace
}  // namespace ditattn::kernels::cpu
