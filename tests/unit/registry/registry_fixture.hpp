#pragma once

/// Leaves the process-wide registry as it was: every test clears what it overrode. Members that a test defines stay,
/// under names of their own.

#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "ditattn/registry.hpp"

namespace ditattn::testing {

class RegistryTest : public ::testing::Test {
 protected:
  /// Puts a class behind a member.
  static void use(DiffusionAttentionBackendEnum member, BackendClass backend) {
    const std::string path = "registry_test." + member.name() + ".Backend";
    register_backend_class(path, std::move(backend));
    register_diffusion_backend(member, path);
  }

  void TearDown() override {
    for (DiffusionAttentionBackendEnum member : DiffusionAttentionBackendEnum::members()) member.clear_override();
  }
};

}  // namespace ditattn::testing
