// What back ends promise on a GPU: they work in the caller's stream and wait for nothing, may be captured into a graph,
// may be called from many threads, and a device without memory is an error. Every back end that computes on CUDA here.

#include <cuda_runtime.h>
#include <ditattn/ditattn.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <thread>

#include "tests/cuda/gpu_testing.hpp"
#include "tests/unit/packed_metadata.hpp"

namespace ditattn {
namespace {

using testing::InStream;
using testing::kGpu;
using testing::must;
using testing::random_tensor;
using testing::relative_error;
using testing::same_bytes;

// (1, rows, 4, 64) against (1, keys, 2, 64), and the answer of the CPU's native engine.
struct Call {
  Tensor query, key, value, expected;
  ImplConfig config{.num_heads = 4, .head_size = 64, .num_kv_heads = 2};

  Call(std::int64_t rows, std::int64_t keys, std::uint64_t seed, const AttentionMetadata& metadata = {}) {
    const Tensor q = random_tensor({1, rows, 4, 64}, kFloat16, seed);
    const Tensor k = random_tensor({1, keys, 2, 64}, kFloat16, seed + 1);
    const Tensor v = random_tensor({1, keys, 2, 64}, kFloat16, seed + 2);
    expected = DiffusionAttentionBackendEnum::TORCH_SDPA.get_class()->make(config)->forward(q, k, v, metadata);
    query = copy_to(q, kGpu);
    key = copy_to(k, kGpu);
    value = copy_to(v, kGpu);
  }
  [[nodiscard]] double error(const Tensor& out) const { return relative_error(copy_to(out, kCpu), expected); }
};

// Keys from `length` on are hidden; where `every_other`, also each second one before.
AttentionMetadata padding(std::int64_t keys, std::int64_t length, bool every_other, DLDevice device) {
  const Tensor mask = empty({1, keys}, kBool);
  for (std::int64_t i = 0; i < keys; ++i)
    store_element(mask.data_ptr(), i, kBool, i < length && (!every_other || i % 2 == 0));
  return AttentionMetadata({.attn_mask = copy_to(mask, device)});
}

// Five sequences of 130 rows against 300 keys: one of a row and a key, one without rows, one without keys.
AttentionMetadata packed_sequences(DLDevice device) {
  MetadataExtra extra = testing::packed({0, 1, 40, 40, 100, 130}, {0, 1, 70, 150, 150, 300});
  for (const char* name : {"cu_seqlens_q", "cu_seqlens_k"}) {
    extra.Set(name, copy_to(extra.at(name).cast<Tensor>(), device));
  }
  return AttentionMetadata({.extra = extra});
}

// 20 rows and 30 keys of text before the image's, of which the last 5 are padding.
AttentionMetadata joint_tokens(DLDevice device) {
  const Tensor mask = empty({1, 30}, kBool);
  for (std::int64_t i = 0; i < 30; ++i) store_element(mask.data_ptr(), i, kBool, i < 25);
  return copy_to(AttentionMetadata({.joint_query = random_tensor({1, 20, 4, 64}, kFloat16, 70),
                                    .joint_key = random_tensor({1, 30, 2, 64}, kFloat16, 71),
                                    .joint_value = random_tensor({1, 30, 2, 64}, kFloat16, 72),
                                    .joint_attn_mask = mask}),
                 device);
}

std::vector<BackendClass> gpu_backends() {
  std::vector<BackendClass> backends;
  for (const DiffusionAttentionBackendEnum member : DiffusionAttentionBackendEnum::members()) {
    try {
      BackendClass backend = member.get_class();
      backend->validate_available();
      if (std::ranges::count(backend->capabilities().devices, "cuda") > 0) backends.push_back(std::move(backend));
    } catch (const Error&) {
      continue;  // not built, not for this machine, or not registered
    }
  }
  return backends;
}

// Largest relative error: of quantized backends that of their numbers.
double bound_of(const BackendClass& backend) {
  const std::string name = backend->get_name();
  return name == "SAGE_ATTN_3" ? 0.25 : name == "SAGE_ATTN" ? 5e-2 : 2e-3;
}

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda_info().devices.empty()) GTEST_SKIP() << "skipped: no CUDA device (" << cuda_info().reason << ")";
    ASSERT_FALSE(gpu_backends().empty());
  }
};

TEST(CudaInfo, DevicesOrTheReason) {
  const CudaInfo& info = cuda_info();
  EXPECT_EQ(info.devices.empty(), !info.reason.empty());
  for (const CudaDevice& device : info.devices) {
    fmt::print("{}: compute capability {}, {} multiprocessors, {} bytes; driver {}\n", device.name,
               device.compute_capability, device.multiprocessors, device.memory_bytes, info.driver_version);
    EXPECT_FALSE(device.name.empty());
    EXPECT_GE(device.compute_capability, 50);
    EXPECT_GT(device.memory_bytes, 1 << 30);
    EXPECT_GT(device.multiprocessors, 0);
  }
}

TEST_F(Cuda, CopiesKeepStrides) {
  const Tensor whole = random_tensor({4, 5, 6}, kFloat32, 1);
  auto* last = static_cast<float*>(whole.data_ptr()) + 3 * 30;
  const Tensor view = wrap(last, {4, 3, 6}, kFloat32, {-30, 6, 1});
  const Tensor back = copy_to(copy_to(view, kGpu), kCpu);
  ASSERT_EQ(shape_name(back), "(4, 3, 6)");
  for (std::int64_t i = 0; i < 4; ++i) {
    for (std::int64_t j = 0; j < 18; ++j) {
      EXPECT_EQ(static_cast<float*>(back.data_ptr())[i * back.stride(0) + j], last[-30 * i + j]);
    }
  }
  EXPECT_EQ(copy_to(copy_to(empty({0, 3}, kFloat32), kGpu), kCpu).numel(), 0);
}

// The stream is busy for half a second: the call returns long before, and what it writes is there only afterwards.
TEST_F(Cuda, CallsAreQueuedInTheCallersStream) {
  for (const BackendClass& backend : gpu_backends()) {
    const InStream stream;
    const Call call(100, 200, 7);
    const auto attention = backend->make(call.config);
    const Tensor out = copy_to(random_tensor({1, 100, 4, 64}, kFloat16, 8), kGpu);
    const Tensor before = copy_to(out, kCpu);
    attention->forward(call.query, call.key, call.value, {}, {.out = copy_to(out, kGpu)});
    must(cudaStreamSynchronize(stream.get()));
    const auto start = std::chrono::steady_clock::now();
    must(cudaLaunchHostFunc(
        stream.get(), [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(500)); }, nullptr));
    attention->forward(call.query, call.key, call.value, {}, {.out = out});
    const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    EXPECT_LT(ms, 100) << backend->get_name() << " waited";
    EXPECT_EQ(cudaStreamQuery(stream.get()), cudaErrorNotReady);
    must(cudaStreamSynchronize(stream.get()));
    EXPECT_FALSE(same_bytes(out, before)) << backend->get_name();
    EXPECT_LT(call.error(out), bound_of(backend)) << backend->get_name();
  }
}

TEST_F(Cuda, FiftyCallsReplayFromAGraph) {
  using MetadataOn = std::function<AttentionMetadata(DLDevice)>;
  const MetadataOn prefix = [](DLDevice device) { return padding(300, 250, false, device); };
  const MetadataOn holes = [](DLDevice device) { return padding(300, 250, true, device); };
  for (const BackendClass& backend : gpu_backends()) {
    if (!backend->capabilities().graph_safe) continue;
    std::vector<MetadataOn> kinds{prefix, holes};
    if (backend->capabilities().packed) kinds.emplace_back(packed_sequences);
    if (backend->capabilities().joint) kinds.emplace_back(joint_tokens);
    for (const MetadataOn& metadata_on : kinds) {
      const InStream stream;
      const AttentionMetadata metadata = metadata_on(kGpu);
      const Call call(130, 300, 20, metadata_on(kCpu));
      const auto attention = backend->make(call.config);
      std::vector<Tensor> outs;
      for (int i = 0; i < 50; ++i) outs.push_back(copy_to(call.expected, kGpu));
      const Tensor eager = attention->forward(call.query, call.key, call.value, metadata);
      EXPECT_LT(call.error(eager), bound_of(backend)) << backend->get_name();

      cudaGraph_t graph = nullptr;
      cudaGraphExec_t executable = nullptr;
      must(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
      for (const Tensor& out : outs) attention->forward(call.query, call.key, call.value, metadata, {.out = out});
      must(cudaStreamEndCapture(stream.get(), &graph));
      must(cudaGraphInstantiate(&executable, graph, 0));
      for (int replay = 0; replay < 3; ++replay) {
        const auto bytes = static_cast<std::size_t>(2 * call.expected.numel());
        for (const Tensor& out : outs) must(cudaMemsetAsync(out.data_ptr(), 0xFF, bytes, stream.get()));
        must(cudaGraphLaunch(executable, stream.get()));
        must(cudaStreamSynchronize(stream.get()));
        for (const Tensor& out : outs) ASSERT_TRUE(same_bytes(out, eager)) << backend->get_name();
      }
      must(cudaGraphExecDestroy(executable));
      must(cudaGraphDestroy(graph));
    }
  }
}

// Heads before tokens, two batch entries with a gap between them, and results in the same way: nothing is written
// there.
TEST_F(Cuda, PackedSequencesLieAnyhow) {
  constexpr std::int64_t kApart = 320;  // tokens from one head to the next
  const auto view = [](const Tensor& whole, std::int64_t tokens) {
    const std::int64_t heads = whole.size(1);
    return wrap(whole.data_ptr(), {2, tokens, heads, 64}, kFloat16, {heads * kApart * 64, 64, kApart * 64, 1},
                whole.device());
  };
  const ImplConfig config{.num_heads = 4, .head_size = 64, .num_kv_heads = 2};
  const Tensor query = random_tensor({2, 4, kApart, 64}, kFloat16, 60);
  const Tensor key = random_tensor({2, 2, kApart, 64}, kFloat16, 61);
  const Tensor value = random_tensor({2, 2, kApart, 64}, kFloat16, 62);
  const Tensor before = empty({2, 4, kApart, 64}, kFloat16);
  std::memset(before.data_ptr(), 0, static_cast<std::size_t>(2 * before.numel()));
  const auto run = [&](const BackendClass& backend, DLDevice device) {
    const Tensor q = copy_to(query, device);
    const Tensor k = copy_to(key, device);
    const Tensor v = copy_to(value, device);
    Tensor out = copy_to(before, device);
    backend->make(config)->forward(view(q, 130), view(k, 300), view(v, 300), packed_sequences(device),
                                   {.out = view(out, 130)});
    return copy_to(out, kCpu);
  };
  const Tensor expected = run(DiffusionAttentionBackendEnum::TORCH_SDPA.get_class(), kCpu);
  for (const BackendClass& backend : gpu_backends()) {
    if (!backend->capabilities().packed) continue;
    EXPECT_LT(relative_error(run(backend, kGpu), expected), bound_of(backend)) << backend->get_name();
  }
}

// What needs the host, a new mask and a new tensor, is refused while a graph is captured, and does not break it.
TEST_F(Cuda, CaptureRefusesWhatNeedsTheHost) {
  const InStream stream;
  const Call call(10, 20, 30);
  const auto attention = DiffusionAttentionBackendEnum::TORCH_SDPA.get_class()->make(call.config);
  const AttentionMetadata metadata = padding(20, 10, false, kGpu);
  const Tensor out = empty(std::array<std::int64_t, 4>{1, 10, 4, 64}, kFloat16, kGpu);
  attention->forward(call.query, call.key, call.value, {}, {.out = out});  // engines begin at their first call
  cudaGraph_t graph = nullptr;
  must(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  EXPECT_THROW(attention->forward(call.query, call.key, call.value, metadata, {.out = out}), NotImplementedError);
  EXPECT_THROW(attention->forward(call.query, call.key, call.value), NotImplementedError);
  attention->forward(call.query, call.key, call.value, {}, {.out = out});
  must(cudaStreamEndCapture(stream.get(), &graph));
  must(cudaGraphDestroy(graph));
  EXPECT_NO_THROW(attention->forward(call.query, call.key, call.value, metadata, {.out = out}));
}

TEST_F(Cuda, EightThreadsOnEightStreams) {
  for (const BackendClass& backend : gpu_backends()) {
    std::vector<std::thread> threads;
    std::array<double, 8> worst{};
    for (std::size_t t = 0; t < worst.size(); ++t) {
      threads.emplace_back([&, t] {
        const InStream stream;
        const auto rows = static_cast<std::int64_t>(40 + 30 * t);
        const Call call(rows, 3 * rows, 100 * t);
        const auto attention = backend->make(call.config);
        for (int i = 0; i < 20; ++i) {
          worst[t] = std::max(worst[t], call.error(attention->forward(call.query, call.key, call.value)));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const double error : worst) EXPECT_LT(error, bound_of(backend)) << backend->get_name();
    fmt::print("{}: worst error {:.1e}\n", backend->get_name(), *std::ranges::max_element(worst));
  }
}

// Scratch memory belongs to the stream: what one thread queues must not meet what another does.
TEST_F(Cuda, EightThreadsOnOneStream) {
  constexpr int calls = 300;
  for (const BackendClass& backend : gpu_backends()) {
    std::vector<std::thread> threads;
    std::barrier ready(8);
    std::array<double, 8> error{};
    std::array<int, 8> different{};
    for (std::size_t t = 0; t < error.size(); ++t) {
      threads.emplace_back([&, t] {
        const auto length = static_cast<std::int64_t>(20 + 40 * t);
        const bool holes = t % 2 == 0;
        const AttentionMetadata metadata = padding(400, length, holes, kGpu);
        const Call call(70, 400, 100 * t, padding(400, length, holes, kCpu));
        const auto attention = backend->make(call.config);
        std::vector<Tensor> outs;
        for (int i = 0; i < calls; ++i)
          outs.push_back(empty(std::array<std::int64_t, 4>{1, 70, 4, 64}, kFloat16, kGpu));
        const Tensor first = attention->forward(call.query, call.key, call.value, metadata);
        error[t] = call.error(first);
        ready.arrive_and_wait();  // what is built at a first call is there: now all queue at once
        for (const Tensor& out : outs) attention->forward(call.query, call.key, call.value, metadata, {.out = out});
        for (const Tensor& out : outs) different[t] += same_bytes(out, first) ? 0 : 1;
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (std::size_t t = 0; t < error.size(); ++t) {
      EXPECT_LT(error[t], bound_of(backend)) << backend->get_name();
      EXPECT_EQ(different[t], 0) << "of " << calls << " calls of thread " << t << ", " << backend->get_name();
    }
  }
}

TEST_F(Cuda, MemoryThatIsNotThereIsAnError) {
  const std::int64_t bytes = std::int64_t{1} << 46;
  try {
    empty(std::array{bytes}, kBool, kGpu);
    FAIL() << "64 TiB were allocated";
  } catch (const MemoryError& error) {
    EXPECT_NE(error.message().find(fmt::format("Cannot allocate {} bytes on cuda:0: ", bytes)), std::string::npos)
        << error.message();
  }
  const Call call(10, 20, 40);  // the process goes on
  const auto attention = DiffusionAttentionBackendEnum::TORCH_SDPA.get_class()->make(call.config);
  EXPECT_LT(call.error(attention->forward(call.query, call.key, call.value)), 2e-3);
}

TEST_F(Cuda, EachDeviceHasItsOwnTensors) {
  const auto devices = static_cast<int>(cuda_info().devices.size());
  if (devices < 2) GTEST_SKIP() << "skipped: one CUDA device";
  const Call call(50, 60, 50);
  const auto attention = DiffusionAttentionBackendEnum::TORCH_SDPA.get_class()->make(call.config);
  for (int i = 0; i < devices; ++i) {
    const DLDevice device{kDLCUDA, i};
    const Tensor out =
        attention->forward(copy_to(copy_to(call.query, kCpu), device), copy_to(copy_to(call.key, kCpu), device),
                           copy_to(copy_to(call.value, kCpu), device));
    EXPECT_EQ(device_name(out.device()), fmt::format("cuda:{}", i));
    EXPECT_LT(call.error(out), 2e-3);
  }
}

}  // namespace
}  // namespace ditattn
