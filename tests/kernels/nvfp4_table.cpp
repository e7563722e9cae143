// Writes what kernels/nvfp4.hpp makes of every float16 number, for nvfp4_check.py: the bits of the number, then its
// e2m1 and e4m3 codes.

#include <cstdint>
#include <cstdio>

#include "kernels/cpu/half.hpp"
#include "kernels/nvfp4.hpp"

int main() {
  using namespace ditattn::kernels;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const float x = cpu::from_f16(static_cast<std::uint16_t>(bits));
    std::printf("%u %u %u\n", bits, E2m1::encode(E2m1::round(x)), E4m3::encode(E4m3::round(x)));
  }
}
