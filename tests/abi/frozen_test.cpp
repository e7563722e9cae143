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

namespace ditattn {
namespace {

class FrozenPlugin : public testing::PluginTest {
 protected:
  BackendClass backend_ = resolve_class_path("zoo.frozen_v3.Mean");
};

TEST_F(FrozenPlugin, StillLoadsAndComputes) {
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

TEST_F(FrozenPlugin, GetsArgumentsAsItKnowsThem) {
  EXPECT_EQ(backend_->explain({.batch = 3, .mask = MaskKind::boolean, .causal = true, .lse = true}).reasons,
            (std::vector<std::string>{"batch 3", "mask 2", "features 3"}));
  EXPECT_EQ(testing::error_text<ValueError>([&] {
              return backend_->make({.num_heads = 3, .head_size = 8, .softmax_scale = 2, .prefix = "refused"});
            }),
            "3 8 1 0 0 0");
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
