#pragma once

/// \file
/// ditattn: attention for diffusion transformers. One name picks the kernel, and every name works.
///
///     #include <ditattn/ditattn.hpp>
///
///     int main() {
///       using namespace ditattn;
///       Tensor query = empty({1, 1024, 24, 128}, kFloat32);  // (batch, tokens, heads, head size)
///       Tensor key = empty({1, 1024, 24, 128}, kFloat32);
///       Tensor value = empty({1, 1024, 24, 128}, kFloat32);
///       for (const Tensor& t : {query, key, value}) std::fill_n(static_cast<float*>(t.data_ptr()), t.numel(), 0.5F);
///       BackendClass backend = DiffusionAttentionBackendEnum::from_name("FLASH_ATTN").get_class();
///       auto attention = backend->make({.num_heads = 24, .head_size = 128});
///       Tensor out = attention->forward(query, key, value);
///     }
///
/// Names are looked up in the registry (registry.hpp), where each has a class path that can be overridden; the class
/// says what it can do (problem.hpp) and builds implementations (backend.hpp), whose `forward` takes tensors
/// (tensor.hpp) and metadata such as masks (metadata.hpp). Errors: errors.hpp. Writing a backend: plugin.hpp. Seeing
/// every call: observer.hpp; checking its numbers: guard.hpp.

// IWYU pragma: begin_exports
#include "ditattn/attention.hpp"
#include "ditattn/attention_config.hpp"
#include "ditattn/backend.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/guard.hpp"
#include "ditattn/launches.hpp"
#include "ditattn/log.hpp"
#include "ditattn/metadata.hpp"
#include "ditattn/observer.hpp"
#include "ditattn/problem.hpp"
#include "ditattn/registry.hpp"
#include "ditattn/safetensors.hpp"
#include "ditattn/selector.hpp"
#include "ditattn/tensor.hpp"
#include "ditattn/threads.hpp"
#include "ditattn/tuner.hpp"
#include "ditattn/version.hpp"
// IWYU pragma: end_exports
