#pragma once

/// Packed sequences as metadata, from plain numbers.

#include <string>
#include <vector>

#include "ditattn/metadata.hpp"

namespace ditattn::testing {

/// Int32 offsets in host memory.
inline Tensor cu_seqlens(const std::vector<std::int64_t>& values) {
  Tensor tensor = empty({static_cast<std::int64_t>(values.size())}, kInt32);
  for (std::size_t i = 0; i < values.size(); ++i) {
    store_element(data_pointer(tensor), static_cast<std::int64_t>(i), kInt32, static_cast<double>(values[i]));
  }
  return tensor;
}

/// The four keys of packed sequences. By default the maxima allow everything.
inline MetadataExtra packed(const std::vector<std::int64_t>& q, const std::vector<std::int64_t>& k,
                            std::int64_t max_q = 1000, std::int64_t max_k = 1000) {
  MetadataExtra extra;
  extra.Set("cu_seqlens_q", cu_seqlens(q));
  extra.Set("cu_seqlens_k", cu_seqlens(k));
  extra.Set("max_seqlen_q", max_q);
  extra.Set("max_seqlen_k", max_k);
  return extra;
}

/// `extra` with one entry more, or another value for it.
inline MetadataExtra with(MetadataExtra extra, const std::string& key, const tvm::ffi::Any& value) {
  extra.Set(key, value);
  return extra;
}

}  // namespace ditattn::testing
