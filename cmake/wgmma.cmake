# Writes the header of Hopper's warpgroup matrix products, m64nNk16 with float32 sums: one operand per register has to be
# spelled out, so the text is made from the list of N.
#   cmake -DOUTPUT=wgmma.hpp "-DSIZES=64;128" -P cmake/wgmma.cmake
string(CONCAT text
  "#pragma once\n\n// Made by cmake/wgmma.cmake.\n\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n\n#include <cstdint>\n\n"
  "namespace ditattn::kernels::cuda {\n\n"
  "/// sums += A · B over 16 of the reduction. `ss`: A and B in shared memory, both with the reduction contiguous;\n"
  "/// `rs`: A in registers, B with its N contiguous. Without `accumulate` the sums are overwritten.\n"
  "template <class T, int kN>\nstruct Wgmma;\n")
foreach(type __half __nv_bfloat16)
  if(type STREQUAL __half)
    set(name f16)
  else()
    set(name bf16)
  endif()
  foreach(n IN LISTS SIZES)
    math(EXPR count "${n} / 2")
    math(EXPR last "${count} - 1")
    set(registers "")
    set(operands "")
    foreach(i RANGE ${last})
      list(APPEND registers "%${i}")
      list(APPEND operands "\"+f\"(d[${i}])")
    endforeach()
    list(JOIN registers ", " registers)
    list(JOIN operands ", " operands)
    foreach(i RANGE 6)
      math(EXPR x${i} "${count} + ${i}")
    endforeach()
    set(head "wgmma.mma_async.sync.aligned.m64n${n}k16.f32.${name}.${name}")
    string(APPEND text "
template <>
struct Wgmma<${type}, ${n}> {
  static __device__ __forceinline__ void ss(float (&d)[${count}], std::uint64_t a, std::uint64_t b, int accumulate) {
    asm volatile(\"{\\n.reg .pred p;\\nsetp.ne.b32 p, %${x2}, 0;\\n${head} {${registers}}, %${x0}, %${x1}, p, 1, 1, 0, 0;\\n}\\n\"
                 : ${operands}
                 : \"l\"(a), \"l\"(b), \"r\"(accumulate));
  }
  static __device__ __forceinline__ void rs(float (&d)[${count}], const std::uint32_t* a, std::uint64_t b, int accumulate) {
    asm volatile(\"{\\n.reg .pred p;\\nsetp.ne.b32 p, %${x5}, 0;\\n${head} {${registers}}, {%${x0}, %${x1}, %${x2}, %${x3}}, %${x4}, p, 1, 1, 1;\\n}\\n\"
                 : ${operands}
                 : \"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3]), \"l\"(b), \"r\"(accumulate));
  }
};
")
  endforeach()
endforeach()
string(APPEND text "\n}  // namespace ditattn::kernels::cuda\n")
file(WRITE ${OUTPUT} "${text}")
