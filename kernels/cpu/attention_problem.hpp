#pragma once

/// What the CPU's attention kernels take.

#include "kernels/attention_problem.hpp"

namespace ditattn::kernels::cpu {

using kernels::AttentionProblem;
using kernels::element_bytes;
using kernels::ElementType;
using kernels::KeySegment;
using kernels::Mask;
using kernels::QuerySegment;
using kernels::Strides;

/// How a kernel spreads work: calls body(context, i) once for each i in [0, count).
struct Executor {
  using Body = void (*)(void* context, std::int64_t index);
  int threads = 1;
  void (*parallel_for)(std::int64_t count, Body body, void* context) = nullptr;
};

}  // namespace ditattn::kernels::cpu
