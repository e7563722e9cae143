#pragma once

#include <string>
#include <vector>

#include "models/catalogue.hpp"
#include "tools/ditattn/inputs.hpp"

namespace ditattn::cli {

/// The model of the catalogue with that name, in any case; UsageError otherwise.
const Model& model_named(const std::string& name);

/// One attention problem of the catalogue.
struct ModelProblem {
  std::string name;  ///< "PixArt-Sigma@512x512:cross"
  ModelRole role;
};

/// What "NAME[@RESOLUTION][:ROLE]" or a short name means: without a resolution the model's first, without a role all of
/// them.
/// UsageError for what is not in the catalogue.
std::vector<ModelProblem> parse_model_problems(const std::string& given);

/// 10¹² operations that a call takes, causality and masks aside.
double tflop(const ModelRole& role);

/// Whether a call takes seconds on a CPU, or on a GPU, at most.
bool is_affordable(const ModelProblem& problem, DLDevice device);

/// ValueError for a problem that is not, which says what is small enough.
void check_work(const ModelProblem& problem, DLDevice device);

/// Standard normal tensors of the role's shape, joint tokens apart; where it has a mask, the last quarter of its keys
/// (of its joint keys if it has any) is padding.
Case model_case(const ModelProblem& problem, DLDataType dtype, std::uint64_t seed);

}  // namespace ditattn::cli
