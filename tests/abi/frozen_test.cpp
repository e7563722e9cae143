// What compiled plug-ins and programs rely on, against frozen copies (docs/versioning.md): a plug-in of interface
// version 3, and where the members and virtual functions of public types lie.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <fstream>
#include <random>
#include <sstream>

#include "ditattn/attention.hpp"
#include "ditattn/communicator.hpp"
#include "ditattn/observer.hpp"
#include "ditattn/version.hpp"
#include "tests/abi/plugin_fixture.hpp"
#include "tests/abi/plugins/good_backends.hpp"

namespace ditattn {
namespace {

void skip_without_other_compiler() {
  if (!ABI_OTHER_COMPILER) GTEST_SKIP() << "needs clang++ beside g++ (make sanitize installs it), when CMake is run";
}

// Compiled by the library's compiler, and by another one with another layout of the standard library's types.
class FrozenPlugin : public testing::PluginTest, public ::testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    if (GetParam() != std::string("frozen_v3")) skip_without_other_compiler();
    if (!IsSkipped()) backend_ = resolve_class_path(std::string("zoo.") + GetParam() + ".Mean");
  }
  BackendClass backend_;
};
INSTANTIATE_TEST_SUITE_P(Binaries, FrozenPlugin, ::testing::Values("frozen_v3", "frozen_v3_other"));

TEST_P(FrozenPlugin, StillLoadsAndComputes) {
  EXPECT_EQ(backend_->get_name(), "MEAN");
  EXPECT_EQ(backend_->capabilities().engine, "frozen");
  EXPECT_EQ(backend_->kernel_name({}), "") << "the entry is optional";
  const Tensor query = empty({2, 5, 3, 8}, kFloat32);
  const Tensor value = empty({2, 7, 3, 8}, kFloat32);
  std::fill_n(static_cast<float*>(query.data_ptr()), query.numel(), 0.F);
  std::mt19937_64 random(std::random_device{}());
  auto* values = static_cast<float*>(value.data_ptr());
  for (std::int64_t i = 0; i < value.numel(); ++i) values[i] = static_cast<float>(std::normal_distribution<>()(random));
  const Tensor lse = empty({2, 3, 5}, kFloat32);
  const Tensor out = backend_->make({.num_heads = 3, .head_size = 8})->forward(query, value, value, {}, {.lse = lse});
  double worst = 0;
  for (std::int64_t i = 0; i < out.numel(); ++i) {
    double sum = 0;
    for (std::int64_t k = 0; k < 7; ++k) sum += values[i / 120 * 168 + k * 24 + i % 24];
    worst = std::max(worst, std::abs(static_cast<const float*>(out.data_ptr())[i] - sum / 7));
  }
  std::cout << "largest error " << worst << "\n";
  EXPECT_LE(worst, 1e-6);
  EXPECT_FLOAT_EQ(static_cast<const float*>(lse.data_ptr())[29], std::log(7.F));
}

TEST_P(FrozenPlugin, GetsArgumentsAsItKnowsThem) {
  EXPECT_EQ(backend_->explain({.batch = 3, .mask = MaskKind::boolean, .causal = true, .lse = true}).reasons,
            (std::vector<std::string>{"batch 3", "mask 2", "features 3"}));
  EXPECT_EQ(testing::error_text<ValueError>([&] {
              return backend_->make({.num_heads = 3, .head_size = 8, .softmax_scale = 2, .prefix = "refused"});
            }),
            "3 8 1 0 0 0");
}

// Classes that another compiler laid out: objects, virtual functions, exceptions both ways.
class OtherCompiler : public testing::PluginTest {
 protected:
  void SetUp() override { skip_without_other_compiler(); }
};

TEST_F(OtherCompiler, ComputesAndDescribes) {
  testing::expect_doubles(*resolve_class_path("zoo.good_other.Doubler"));
  const BackendClass odd = resolve_class_path("zoo.good_other.Odd");
  EXPECT_EQ(odd->capabilities().engine, odd_capabilities().engine);
  EXPECT_EQ(odd->capabilities().head_sizes.list, odd_capabilities().head_sizes.list);
  EXPECT_EQ(odd->kernel_name({.seq_kv = 2}), "odd kernel of 2");
  EXPECT_EQ(odd->explain({.seq_kv = 1}).reasons,
            (std::vector<std::string>{"one key is too few", "and so is one reason"}));
}

TEST_F(OtherCompiler, ReadsMetadataAndThrows) {
  const BackendClass backend = resolve_class_path("zoo.good_other.Doubler");
  const auto attention = backend->make({.num_heads = 2, .head_size = 2, .softmax_scale = 0.5});
  const Tensor mask = empty({1, 1, 1, 3}, kBool);
  for (int key = 0; key < 3; ++key) store_element(data_pointer(mask), key, kBool, key != 1);
  const Tensor lse = empty({1, 2, 4}, kFloat32);
  const Tensor out = testing::forward_doubler(*attention, AttentionMetadata({.attn_mask = mask}), {.lse = lse});
  EXPECT_EQ(load_element(data_pointer(out), 0, kFloat32), 2.5);
  EXPECT_EQ(load_element(data_pointer(lse), 0, kFloat32), 1) << "a dense mask to be read";
  const auto make = [&](const char* prefix) {
    return [=] { return backend->make({.num_heads = 2, .head_size = 2, .prefix = prefix}); };
  };
  EXPECT_EQ(testing::error_text<ValueError>(make("ValueError")), "a wrong value");
  EXPECT_EQ(testing::error_text<NotImplementedError>(make("NotImplementedError")), "not on this chip");
  testing::expect_contains(testing::error_text<Error>(make("int")), {"something that is not a std::exception"});
}

// The Itanium C++ ABI, which GCC and Clang follow on x86-64: a pointer to a data member is its offset, a pointer to a
// virtual function its place in the table, in bytes, plus one.
class Layout {
 public:
  template <class T, class... Members>
  void type(const char* name, Members... members) {
    text_ << name << ": size " << sizeof(T) << ", alignment " << alignof(T);
    if constexpr (sizeof...(members) > 0) {
      text_ << ", members at";
      ((text_ << " " << place(members)), ...);
    }
    text_ << "\n";
  }
  template <class... Functions>
  void virtuals(const char* name, Functions... functions) {
    text_ << name << ": virtual functions at";
    ((text_ << " " << (std::bit_cast<std::array<std::ptrdiff_t, 2>>(functions)[0] - 1) / 8), ...);
    text_ << "\n";
  }
  [[nodiscard]] std::string text() const { return text_.str(); }

 private:
  template <class T, class M>
  static std::ptrdiff_t place(M T::*member) {
    return std::bit_cast<std::ptrdiff_t>(member);
  }
  std::ostringstream text_;
};

struct Backend : AttentionBackend {  // sees what is protected
  static void describe(Layout& layout) {
    layout.virtuals("AttentionBackend", &Backend::get_name, &Backend::capabilities, &Backend::validate_available,
                    &Backend::explain, &Backend::kernel_name, &Backend::create, &Backend::known_kwargs);
  }
};

std::string layout() {
  Layout layout;
  Backend::describe(layout);
  layout.virtuals("AttentionImpl", &AttentionImpl::run);
  layout.virtuals("ForwardObserver", &ForwardObserver::before, &ForwardObserver::instead, &ForwardObserver::after);
  using parallel::Communicator;
  layout.virtuals("Communicator", &Communicator::takes, &Communicator::start, &Communicator::throw_if_failed,
                  &Communicator::split, &Communicator::abort, &Communicator::receive_memory,
                  &Communicator::moves_beside_compute);
  layout.type<AttentionBackend>("AttentionBackend");
  layout.type<AttentionImpl>("AttentionImpl");
  layout.type<AttentionCall>("AttentionCall");
  layout.type<ImplConfig>("ImplConfig", &ImplConfig::num_heads, &ImplConfig::head_size, &ImplConfig::softmax_scale,
                          &ImplConfig::causal, &ImplConfig::num_kv_heads, &ImplConfig::prefix, &ImplConfig::role,
                          &ImplConfig::backend_kwargs);
  layout.type<ForwardOutputs>("ForwardOutputs", &ForwardOutputs::out, &ForwardOutputs::lse);
  layout.type<MaskView>("MaskView", &MaskView::data, &MaskView::dtype, &MaskView::strides, &MaskView::first_row,
                        &MaskView::rows);
  layout.type<QuerySegment>("QuerySegment", &QuerySegment::tensor, &QuerySegment::first_row);
  layout.type<KeySegment>("KeySegment", &KeySegment::key, &KeySegment::value, &KeySegment::first_key, &KeySegment::keys,
                          &KeySegment::prefix, &KeySegment::length_offset, &KeySegment::mask);
  layout.type<CallPlan>("CallPlan", &CallPlan::queries, &CallPlan::num_queries, &CallPlan::keys, &CallPlan::num_keys,
                        &CallPlan::total_rows, &CallPlan::total_keys, &CallPlan::causal, &CallPlan::causal_offset,
                        &CallPlan::ranges);
  layout.type<KeyRanges>("KeyRanges", &KeyRanges::bounds, &KeyRanges::batch_stride, &KeyRanges::copies,
                         &KeyRanges::sequences);
  layout.type<MaskDescription>("MaskDescription", &MaskDescription::kind, &MaskDescription::kv_lengths,
                               &MaskDescription::copies);
  layout.type<Problem>("Problem", &Problem::batch, &Problem::num_heads, &Problem::num_kv_heads, &Problem::seq_q,
                       &Problem::seq_kv, &Problem::head_size, &Problem::dtype, &Problem::device, &Problem::mask,
                       &Problem::causal, &Problem::lse, &Problem::packed, &Problem::joint, &Problem::spans,
                       &Problem::fp8_kv, &Problem::alignment);
  layout.type<Capabilities>("Capabilities", &Capabilities::engine, &Capabilities::devices, &Capabilities::dtypes,
                            &Capabilities::head_sizes, &Capabilities::masks, &Capabilities::gqa, &Capabilities::causal,
                            &Capabilities::causal_alignment, &Capabilities::lse, &Capabilities::alignment);
  layout.type<Verdict>("Verdict", &Verdict::reasons);
  using Fields = AttentionMetadataFields;
  layout.type<Fields>("AttentionMetadataFields", &Fields::attn_mask, &Fields::joint_query, &Fields::joint_key,
                      &Fields::joint_value, &Fields::joint_attn_mask, &Fields::joint_strategy, &Fields::full_attn_spans,
                      &Fields::query_ranges, &Fields::extra);
  layout.type<AttentionMetadataObj>("AttentionMetadataObj", &AttentionMetadataObj::fields);
  layout.type<AttentionOptions>("AttentionOptions");
  layout.type<ForwardEvent>("ForwardEvent");
  return layout.text();
}

TEST(FrozenLayout, IsThatOfInterfaceVersion3) {
#ifndef __x86_64__
  GTEST_SKIP() << "frozen on x86-64";
#endif
  std::ifstream file(ABI_FROZEN "/layout_v3.txt");
  const std::string frozen((std::istreambuf_iterator<char>(file)), {});
  EXPECT_EQ(layout(), frozen) << "Compiled plug-ins no longer fit: raise DITATTN_INTERFACE_VERSION and freeze anew "
                                 "(docs/versioning.md).";
  EXPECT_EQ(DITATTN_INTERFACE_VERSION, 3) << "freeze the new version beside the old one";
}

}  // namespace
}  // namespace ditattn
