#include "ditattn/tensor.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using testing::error_text;

constexpr std::array kAllDtypes = {kFloat64, kFloat32, kFloat16, kBFloat16, kInt32, kInt64, kBool};

TEST(Dtype, NamesAndTheirInverse) {
  for (DLDataType dtype : kAllDtypes) EXPECT_EQ(parse_dtype(dtype_name(dtype)), dtype) << dtype_name(dtype);
  EXPECT_EQ(dtype_name(kBFloat16), "bfloat16");
  EXPECT_EQ(dtype_name(DLDataType{kDLFloat, 32, 4}), "dtype(code=2, bits=32, lanes=4)");
}

TEST(Dtype, ShortForms) {
  EXPECT_EQ(parse_dtype("f32"), kFloat32);
  EXPECT_EQ(parse_dtype("f16"), kFloat16);
  EXPECT_EQ(parse_dtype("bf16"), kBFloat16);
}

TEST(Dtype, UnknownNameListsTheValidOnes) {
  EXPECT_EQ(error_text<ValueError>([] { parse_dtype("fp8"); }),
            "Unknown dtype 'fp8'. Valid dtypes are: float32, float16, bfloat16, float64, bool, int32, int64");
  error_text<ValueError>([] { parse_dtype(""); });
  error_text<ValueError>([] { parse_dtype("Float32"); });
}

TEST(Device, Names) {
  EXPECT_EQ(device_name(kCpu), "cpu");
  EXPECT_EQ(device_name({kDLCUDA, 3}), "cuda:3");
  EXPECT_EQ(device_name({kDLROCM, 0}), "rocm:0");
}

TEST(ShapeName, LooksLikePython) {
  EXPECT_EQ(shape_name(empty({1, 4096, 24, 128}, kBool)), "(1, 4096, 24, 128)");
  EXPECT_EQ(shape_name(empty({3}, kBool)), "(3,)");
  EXPECT_EQ(shape_name(empty({}, kBool)), "()");
}

TEST(Empty, IsContiguousAndAligned) {
  for (DLDataType dtype : kAllDtypes) {
    const Tensor tensor = empty({2, 3, 5}, dtype);
    EXPECT_EQ(tensor.dtype(), dtype);
    EXPECT_EQ(tensor.numel(), 30);
    EXPECT_EQ(tensor.stride(0), 15);
    EXPECT_EQ(tensor.stride(1), 5);
    EXPECT_EQ(tensor.stride(2), 1);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data_pointer(tensor)) % 64, 0U);
    EXPECT_EQ(tensor.device().device_type, kDLCPU);
  }
}

TEST(Empty, TakesScalarsAndZeroSizes) {
  EXPECT_EQ(empty({}, kFloat32).numel(), 1);
  EXPECT_EQ(empty({4, 0, 8}, kFloat32).numel(), 0);
}

TEST(Empty, RefusesNegativeSizes) {
  EXPECT_EQ(error_text<ValueError>([] { empty({2, -3}, kFloat32); }), "Shape (2, -3) has a negative size.");
}

TEST(Empty, RefusesShapesThatOverflow) {
  constexpr std::int64_t kBig = std::int64_t{1} << 31;
  EXPECT_EQ(error_text<ValueError>([] {
              empty({kBig, kBig}, kFloat32);
            }),
            "Shape (2147483648, 2147483648) does not fit in memory.");
  // Bytes would fit, but not the number of bits, which tvm-ffi counts.
  error_text<ValueError>([] { empty({std::int64_t{1} << 60}, kFloat32); });
  // A zero elsewhere does not make the strides of the other dimensions fit.
  error_text<ValueError>([] { empty({0, kBig, kBig, kBig}, kFloat32); });
}

TEST(Empty, NamesTheSizeThatMemoryLacks) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers end the process where memory cannot be had";
#endif
  testing::expect_contains(error_text<MemoryError>([] { empty({std::int64_t{1} << 56}, kFloat32); }),
                           {"Cannot allocate 288230376151711744 bytes", "(72057594037927936,)", "float32"});
}

TEST(Wrap, SharesTheCallersMemory) {
  std::array<float, 6> data = {0, 1, 2, 3, 4, 5};
  const Tensor tensor = wrap(data.data(), {2, 3}, kFloat32);
  EXPECT_EQ(data_pointer(tensor), data.data());
  EXPECT_EQ(tensor.stride(0), 3);
  store_element(data_pointer(tensor), 4, kFloat32, 42);
  EXPECT_EQ(data[4], 42);
}

TEST(Wrap, KeepsStrides) {
  std::array<float, 6> data = {};
  const Tensor transposed = wrap(data.data(), {3, 2}, kFloat32, {1, 3});
  EXPECT_EQ(transposed.stride(0), 1);
  EXPECT_EQ(transposed.stride(1), 3);
  const Tensor backwards = wrap(data.data() + 5, {6}, kFloat32, {-1});
  EXPECT_EQ(backwards.stride(0), -1);
}

// As DLPack hands them over: PyTorch's tensors without elements have a null pointer, and may be slices.
TEST(DataPointer, IsNullWhereThereIsNoDataWhateverTheOffset) {
  std::array<float, 6> data = {};
  for (void* const start : {static_cast<void*>(nullptr), static_cast<void*>(data.data())}) {
    DLManagedTensor managed{};
    std::array<std::int64_t, 1> shape = {2};
    managed.dl_tensor = {
        .data = start, .device = kCpu, .ndim = 1, .dtype = kFloat32, .shape = shape.data(), .byte_offset = 16};
    managed.deleter = [](DLManagedTensor*) {};
    const Tensor tensor = Tensor::FromDLPack(&managed);
    EXPECT_EQ(data_pointer(tensor), start == nullptr ? nullptr : static_cast<void*>(data.data() + 4));
  }
}

TEST(Wrap, RefusesANumberOfStridesThatIsNotTheRank) {
  float value = 0;
  EXPECT_EQ(error_text<ValueError>([&] {
              wrap(&value, {1, 1}, kFloat32, {1});
            }),
            "Shape (1, 1) has 2 sizes, but 1 strides were given.");
}

TEST(DataPointer, CountsTheByteOffset) {
  std::array<float, 4> data = {};
  DLManagedTensorVersioned managed{};
  std::int64_t shape = 2;
  std::int64_t stride = 1;
  managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  managed.dl_tensor = {data.data(), kCpu, 1, kFloat32, &shape, &stride, 8};
  const Tensor tensor = Tensor::FromDLPackVersioned(&managed);
  EXPECT_EQ(data_pointer(tensor), data.data() + 2);
}

TEST(Elements, EveryDtypeGivesBackWhatItHolds) {
  for (DLDataType dtype : kAllDtypes) {
    const Tensor tensor = empty({3}, dtype);
    for (int i = 0; i < 3; ++i) store_element(data_pointer(tensor), i, dtype, i % 2);
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(load_element(data_pointer(tensor), i, dtype), i % 2) << dtype_name(dtype) << " element " << i;
    }
  }
}

TEST(Elements, IntegersAndBooleans) {
  std::int32_t small = 0;
  store_element(&small, 0, kInt32, -2147483648.);
  EXPECT_EQ(small, INT32_MIN);
  std::int64_t large = 0;
  store_element(&large, 0, kInt64, 0x1p53);
  EXPECT_EQ(large, std::int64_t{1} << 53);
  std::uint8_t truth = 7;  // what some producers store for true
  EXPECT_EQ(load_element(&truth, 0, kBool), 1);
}

TEST(Elements, Float32RoundsToNearestEven) {
  float value = 0;
  store_element(&value, 0, kFloat32, 1 + 0x1p-24);
  EXPECT_EQ(value, 1.F);
  store_element(&value, 0, kFloat32, 1 + 0x3p-24);
  EXPECT_EQ(value, 1 + 0x1p-22F);
  store_element(&value, 0, kFloat32, std::numeric_limits<double>::infinity());
  EXPECT_TRUE(std::isinf(value));
}

TEST(Elements, OtherDtypesAreRefusedByName) {
  std::array<char, 8> bytes = {};
  const DLDataType odd{kDLUInt, 16, 1};
  EXPECT_EQ(error_text<ValueError>([&] { load_element(bytes.data(), 0, odd); }),
            "Cannot read elements of dtype(code=1, bits=16, lanes=1)");
  EXPECT_EQ(error_text<ValueError>([&] { store_element(bytes.data(), 0, odd, 1); }),
            "Cannot write elements of dtype(code=1, bits=16, lanes=1)");
}

}  // namespace
}  // namespace ditattn
