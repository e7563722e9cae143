#pragma once

/// Leaves the process-wide registry as it was: every test clears what it overrode. Members that a test defines stay,
/// under names of their own.

#include <gtest/gtest.h>

#include "ditattn/registry.hpp"

namespace ditattn::testing {

class RegistryTest : public ::testing::Test {
 protected:
  void TearDown() override {
    for (DiffusionAttentionBackendEnum member : DiffusionAttentionBackendEnum::members()) member.clear_override();
  }
};

}  // namespace ditattn::testing
