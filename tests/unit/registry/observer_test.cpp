// Who observes calls, in which order, of which calls, and what happens where observers come, go and throw.

#include "ditattn/observer.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using testing::counting;
using testing::ToyBackend;

std::unique_ptr<AttentionImpl> toy_layer() {
  return std::make_shared<ToyBackend>()->make({.num_heads = 2, .head_size = 1, .prefix = "blocks.0", .role = "cross"});
}

Tensor forward(const AttentionImpl& layer) {
  return layer.forward(counting({1, 2, 2, 1}), counting({1, 3, 2, 1}), counting({1, 3, 2, 1}));
}

double first_of(const Tensor& tensor) { return load_element(data_pointer(tensor), 0, tensor.dtype()); }

// Writes what it is told into a list that others may share.
class Witness final : public ForwardObserver {
 public:
  Witness(std::string name, std::vector<std::string>& seen) : name_(std::move(name)), seen_(seen) {}
  void before(const ForwardEvent& event) override { tell("before", event); }
  void after(const ForwardEvent& event) override { tell("after", event); }

 private:
  void tell(const char* when, const ForwardEvent& event) {
    seen_.push_back(name_ + " " + when + " " + event.impl.backend().get_name() + " " + event.impl.config().prefix +
                    " " + event.impl.config().role);
  }
  std::string name_;
  std::vector<std::string>& seen_;
};

TEST(ForwardObserver, IsToldBeforeAndAfterWhileItsObservationLives) {
  const auto layer = toy_layer();
  std::vector<std::string> seen;
  forward(*layer);
  {
    const ForwardObservation first(std::make_shared<Witness>("first", seen));
    const ForwardObservation second(std::make_shared<Witness>("second", seen));
    EXPECT_TRUE(seen.empty());
    forward(*layer);
    EXPECT_EQ(seen, (std::vector<std::string>{"first before TOY blocks.0 cross", "second before TOY blocks.0 cross",
                                              "first after TOY blocks.0 cross", "second after TOY blocks.0 cross"}));
  }
  seen.clear();
  forward(*layer);
  EXPECT_TRUE(seen.empty());
}

TEST(ForwardObserver, OneThatIsThereTwiceIsToldTwiceAndLeavesOnce) {
  const auto layer = toy_layer();
  std::vector<std::string> seen;
  const auto witness = std::make_shared<Witness>("it", seen);
  const ForwardObservation outer(witness);
  {
    const ForwardObservation inner(witness);
    forward(*layer);
    EXPECT_EQ(seen.size(), 4U);
  }
  forward(*layer);
  EXPECT_EQ(seen.size(), 6U);
}

TEST(ForwardObserver, SeesTensorsProblemAndOutput) {
  class Checker final : public ForwardObserver {
   public:
    void before(const ForwardEvent& event) override {
      EXPECT_EQ(event.call.key.size(1), 3);
      EXPECT_EQ(event.problem.seq_kv, 3);
      EXPECT_TRUE(event.problem.lse);
      store_element(data_pointer(event.call.out), 0, kFloat32, -1);
    }
    void after(const ForwardEvent& event) override { out = first_of(event.call.out); }
    double out = 0;
  };
  const auto checker = std::make_shared<Checker>();
  const ForwardObservation observation(checker);
  const Tensor lse = empty({1, 2, 2}, kFloat32);
  const Tensor out = toy_layer()->forward(counting({1, 2, 2, 1}), counting({1, 3, 2, 1}), counting({1, 3, 2, 1}), {},
                                          {.out = {}, .lse = lse});
  EXPECT_EQ(checker->out, 2);  // the mean of 0, 2 and 4
  EXPECT_EQ(first_of(out), 2);
}

TEST(ForwardObserver, IsNotToldOfRefusedAndEmptyCalls) {
  const auto layer = toy_layer();
  std::vector<std::string> seen;
  const ForwardObservation observation(std::make_shared<Witness>("it", seen));
  EXPECT_THROW(layer->forward(counting({1, 2, 3, 1}), counting({1, 3, 2, 1}), counting({1, 3, 2, 1})), ValueError);
  EXPECT_THROW(layer->forward(counting({1, 2, 2, 1}, kFloat64), counting({1, 3, 2, 1}, kFloat64),
                              counting({1, 3, 2, 1}, kFloat64)),
               Error);
  layer->forward(counting({1, 0, 2, 1}), counting({1, 3, 2, 1}), counting({1, 3, 2, 1}));
  EXPECT_TRUE(seen.empty());
}

TEST(ForwardObserver, WhatItThrowsReachesTheCaller) {
  class Guard final : public ForwardObserver {
   public:
    explicit Guard(bool early) : early_(early) {}
    void before(const ForwardEvent&) override {
      if (early_) throw std::runtime_error("early");
    }
    void after(const ForwardEvent&) override { throw std::runtime_error("late"); }

   private:
    bool early_;
  };
  const auto layer = toy_layer();
  for (const bool early : {true, false}) {
    std::vector<std::string> seen;
    const ForwardObservation guard(std::make_shared<Guard>(early));
    const ForwardObservation witness(std::make_shared<Witness>("it", seen));
    try {
      forward(*layer);
      ADD_FAILURE() << "nothing was thrown";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), early ? "early" : "late");
    }
    EXPECT_EQ(seen.size(), early ? 0U : 1U);
  }
  EXPECT_EQ(first_of(forward(*layer)), 2);
}

TEST(ForwardObserver, ABackEndThatThrowsIsNotDone) {
  class FailingImpl final : public AttentionImpl {
   public:
    using AttentionImpl::AttentionImpl;
    void run(const AttentionCall&) const override { throw Error("RuntimeError", "broken"); }
  };
  class FailingBackend final : public ToyBackend {
   protected:
    [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
      return std::make_unique<FailingImpl>(config);
    }
  };
  const auto layer = std::make_shared<FailingBackend>()->make({.num_heads = 2, .head_size = 1});
  std::vector<std::string> seen;
  const ForwardObservation observation(std::make_shared<Witness>("it", seen));
  EXPECT_THROW(forward(*layer), Error);
  EXPECT_EQ(seen, std::vector<std::string>{"it before TOY  "});
}

TEST(ForwardObserver, MayCallForwardAndObserveItself) {
  class Curious final : public ForwardObserver {
   public:
    void before(const ForwardEvent& event) override {
      if (++calls > 1) return;
      const ForwardObservation more(std::make_shared<Witness>("inner", seen));
      forward(event.impl);
    }
    int calls = 0;
    std::vector<std::string> seen;
  };
  const auto curious = std::make_shared<Curious>();
  const ForwardObservation observation(curious);
  forward(*toy_layer());
  EXPECT_EQ(curious->calls, 2);
  EXPECT_EQ(curious->seen.size(), 2U);
}

TEST(ForwardObserver, NoneIsAnError) {
  EXPECT_EQ(testing::error_text<ValueError>([] { const ForwardObservation observation(nullptr); }),
            "A ForwardObservation needs an observer, got null.");
}

TEST(ForwardObserver, ComesAndGoesWhileOthersCall) {
  class Counter final : public ForwardObserver {
   public:
    void before(const ForwardEvent&) override { ++begun; }
    void after(const ForwardEvent&) override { ++ended; }
    std::atomic<int> begun{0};
    std::atomic<int> ended{0};
  };
  const auto layer = toy_layer();
  const auto always = std::make_shared<Counter>();
  const auto at_times = std::make_shared<Counter>();
  constexpr int threads = 4;
  constexpr int calls = 500;
  {
    const ForwardObservation observation(always);
    std::vector<std::jthread> callers;
    for (int i = 0; i < threads; ++i) {
      callers.emplace_back([&] {
        for (int call = 0; call < calls; ++call) forward(*layer);
      });
    }
    for (int i = 0; i < 200; ++i) const ForwardObservation passing(at_times);
  }
  EXPECT_EQ(always->begun, threads * calls);
  EXPECT_EQ(always->ended, threads * calls);
  EXPECT_EQ(at_times->begun, at_times->ended);  // who sees a call begin sees it end
}

}  // namespace
}  // namespace ditattn
