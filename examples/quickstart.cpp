#include <ditattn/ditattn.hpp>

int main() {
  using namespace ditattn;
  Tensor query = empty({1, 1024, 24, 128}, kFloat32);  // (batch, tokens, heads, head size)
  Tensor key = empty({1, 1024, 24, 128}, kFloat32);
  Tensor value = empty({1, 1024, 24, 128}, kFloat32);
  for (const Tensor& t : {query, key, value}) std::fill_n(static_cast<float*>(t.data_ptr()), t.numel(), 0.5F);
  BackendClass backend = DiffusionAttentionBackendEnum::from_name("FLASH_ATTN").get_class();
  auto attention = backend->make({.num_heads = 24, .head_size = 128});
  Tensor out = attention->forward(query, key, value);
}
