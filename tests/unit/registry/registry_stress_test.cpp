// Everything at once from 32 threads for about a second. Under ThreadSanitizer this is the registry's race test;
// without it, it still checks that every answer is one that some order of the calls could have given.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include "ditattn/plugin.hpp"
#include "ditattn/registry.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::ToyBackend;

struct First : ToyBackend {
  First() : ToyBackend("FIRST", 1) {}
};
struct Second : ToyBackend {
  Second() : ToyBackend("SECOND", 2) {}
};

BackendClass find_linked(std::string_view name) {
  return name == "Toy" ? std::make_shared<ToyBackend>("LINKED", 4) : nullptr;
}

class RegistryStress : public testing::RegistryTest {
 protected:
  static constexpr int kThreads = 32;
  static constexpr std::chrono::milliseconds kDuration{1000};

  // What one thread does until time is up: a random operation on a random member of three.
  void work(unsigned seed) {
    std::mt19937 random(seed);
    const auto end = std::chrono::steady_clock::now() + kDuration;
    while (std::chrono::steady_clock::now() < end) {
      const Enum member = shared_[random() % shared_.size()];
      switch (random() % 10) {
        case 0:
          register_diffusion_backend<First>(member);
          break;
        case 1:
          register_diffusion_backend<Second>(member);
          break;
        case 2:
          register_diffusion_backend(member, "registry_stress.linked.Toy");
          break;
        case 3:
          register_diffusion_backend(member, "registry_stress.nowhere.Backend");
          break;
        case 4:
          member.clear_override();
          break;
        case 5:
          define_and_list(random() % 8);
          break;
        default:
          resolve_and_run(member);
      }
    }
  }

  void define_and_list(unsigned which) {
    const std::string name = "STRESS_" + std::to_string(which);
    const Enum member = Enum::define(name, "registry_stress.defined.Backend");
    EXPECT_EQ(Enum::from_name(name), member);
    for (Enum listed : Enum::members()) EXPECT_FALSE(listed.name().empty());
  }

  void resolve_and_run(Enum member) {
    try {
      const BackendClass backend = member.get_class();
      const std::string name = backend->get_name();
      const double expected = name == "FIRST" ? 3 : name == "SECOND" ? 6 : name == "LINKED" ? 12 : -1;
      EXPECT_EQ(testing::toy_answer(*backend), expected) << name;
      ++forwards_;
    } catch (const ImportError& error) {
      testing::expect_contains(error.message(), {"Cannot import 'registry_stress.nowhere.Backend'"});
      ++refusals_;
    } catch (const NotRegisteredError&) {
      ++refusals_;
    }
  }

  std::array<Enum, 3> shared_ = {Enum::CUSTOM, Enum::define("STRESS_A"), Enum::define("STRESS_B")};
  std::atomic<int> forwards_ = 0;
  std::atomic<int> refusals_ = 0;
};

TEST_F(RegistryStress, RegisterClearDefineResolveAndForwardAtOnce) {
  link_backend_module("registry_stress.linked", &find_linked);
  const testing::LogRecorder log;  // keeps the log's lock in play too
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) threads.emplace_back([this, seed, t] { work(seed + static_cast<unsigned>(t)); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(forwards_, 0);
  EXPECT_GT(refusals_, 0);
  RecordProperty("forwards", forwards_);
  RecordProperty("refusals", refusals_);

  // Quiet again: the last word counts.
  register_diffusion_backend<Second>(shared_[1]);
  EXPECT_EQ(shared_[1].get_class()->get_name(), "SECOND");
}

// One implementation, its class being replaced all the while.
TEST_F(RegistryStress, ClassesHandedOutOutliveTheirRegistration) {
  register_diffusion_backend<First>(Enum::CUSTOM);
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    while (!stop) {
      register_diffusion_backend<First>(Enum::CUSTOM);
      Enum::CUSTOM.clear_override();
    }
  });
  const BackendClass kept = [] {
    while (true) {
      try {
        return Enum::CUSTOM.get_class();
      } catch (const NotRegisteredError&) {
        continue;
      }
    }
  }();
  for (int i = 0; i < 2000; ++i) ASSERT_EQ(testing::toy_answer(*kept), 3);
  stop = true;
  writer.join();
}

}  // namespace
}  // namespace ditattn
