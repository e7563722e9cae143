#pragma once

/// The few functions of NVIDIA's driver that the library itself needs, opened at run time: no header, library or device
/// is needed to build or load it.

#include <cstddef>
#include <cstdint>
#include <string>

#include "ditattn/cuda.hpp"

namespace ditattn::cuda {

/// Stream-ordered memory of a device: its address. MemoryError names the bytes, and what was free.
void* allocate(std::size_t bytes, int device, void* stream);
/// In the stream it was allocated in. Throws nothing.
void release(void* memory, int device, void* stream) noexcept;

/// Between any two addresses, host or `device`; ordered in `stream`.
void copy(void* to, const void* from, std::size_t bytes, int device, void* stream);
/// `rows` rows of `width` bytes, `step` apart in the device's memory, one after the other in the host's.
void copy_rows_to_host(void* to, const void* from, std::size_t step, std::size_t width, std::size_t rows, int device,
                       void* stream);
void wait_for(int device, void* stream);
/// Whether the stream's work is being recorded into a graph: nothing may then wait or read results.
bool is_capturing(int device, void* stream);

/// The same of this thread's stream of any device; never of a CPU's.
bool is_captured(DLDevice device);

}  // namespace ditattn::cuda
