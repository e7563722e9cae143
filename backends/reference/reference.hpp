#pragma once

/// The oracle: slow attention in float64 that every backend is measured against. It shares nothing with them: it reads
/// masks from the metadata itself, and knows no tiles, prefixes or online softmax.

#include <ditattn/backend.hpp>

#include <cstdint>
#include <span>
#include <vector>

namespace ditattn::reference {

/// One output row.
struct Row {
  std::int64_t batch;
  std::int64_t head;
  std::int64_t query;
};

struct Result {
  std::vector<double> out;     ///< rows × head size
  std::vector<double> abs;     ///< rows × head size: Σ P·|V|, what errors are measured against
  std::vector<double> random;  ///< rows × head size: √Σ P²·V², the size of `out` where the signs of V are random
  std::vector<double> lse;     ///< rows: natural log-sum-exp of the scaled, masked logits
};

/// Attention of the given rows, or of all in (batch, head, query) order where `rows` is empty. Tensors as for
/// `AttentionImpl::forward`, on the host and already checked; ValueError for a row or dtype that there is not. Hidden
/// keys are skipped: what stands there never shows. Rows without keys, or with no logit above −∞, give zeros and
/// an LSE of −∞.
Result attention(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionMetadata& metadata,
                 double softmax_scale, bool causal, CausalAlignment alignment, std::span<const Row> rows = {});

}  // namespace ditattn::reference
