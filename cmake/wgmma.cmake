# Writes the header of Hopper's warpgroup matrix products, m64nN: one operand per register has to be spelled out, so the
# text is made from the list of N.
#   cmake -DOUTPUT=wgmma.hpp "-DSIZES=64;128" -P cmake/wgmma.cmake
string(CONCAT text
  "#pragma once\n\n// Made by cmake/wgmma.cmake.\n\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cuda_fp8.h>\n\n#include <cstdint>\n\n"
  "namespace ditattn::kernels::cuda {\n\n"
  "/// sums += A · B over 32 bytes of the reduction. `ss`: A and B in shared memory, both with the reduction contiguous;\n"
  "/// `rs`: A in registers, B with its N contiguous where elements have two bytes, with the reduction where they have one.\n"
  "/// Without `accumulate` the sums are overwritten.\n"
  "template <class T, int kN>\nstruct Wgmma;\n")

# Elements of `type`, which PTX calls `name`, `k` in 32 bytes, and sums; what `ss` and `rs` have after `accumulate`.
function(add_products type name k sum constraint ss_options rs_options)
  foreach(n IN LISTS SIZES)
    math(EXPR count "${n} / 2")
    math(EXPR last "${count} - 1")
    set(registers "")
    set(operands "")
    foreach(i RANGE ${last})
      list(APPEND registers "%${i}")
      list(APPEND operands "\"+${constraint}\"(d[${i}])")
    endforeach()
    list(JOIN registers ", " registers)
    list(JOIN operands ", " operands)
    foreach(i RANGE 6)
      math(EXPR x${i} "${count} + ${i}")
    endforeach()
    set(head "wgmma.mma_async.sync.aligned.m64n${n}k${k}.${name}")
    string(APPEND text "
template <>
struct Wgmma<${type}, ${n}> {
  static __device__ __forceinline__ void ss(${sum} (&d)[${count}], std::uint64_t a, std::uint64_t b, int accumulate) {
    asm volatile(\"{\\n.reg .pred p;\\nsetp.ne.b32 p, %${x2}, 0;\\n${head} {${registers}}, %${x0}, %${x1}, p${ss_options};\\n}\\n\"
                 : ${operands}
                 : \"l\"(a), \"l\"(b), \"r\"(accumulate));
  }
  static __device__ __forceinline__ void rs(${sum} (&d)[${count}], const std::uint32_t* a, std::uint64_t b, int accumulate) {
    asm volatile(\"{\\n.reg .pred p;\\nsetp.ne.b32 p, %${x5}, 0;\\n${head} {${registers}}, {%${x0}, %${x1}, %${x2}, %${x3}}, %${x4}, p${rs_options};\\n}\\n\"
                 : ${operands}
                 : \"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3]), \"l\"(b), \"r\"(accumulate));
  }
};
")
  endforeach()
  set(text "${text}" PARENT_SCOPE)
endfunction()

add_products(__half f32.f16.f16 16 float f ", 1, 1, 0, 0" ", 1, 1, 1")
add_products(__nv_bfloat16 f32.bf16.bf16 16 float f ", 1, 1, 0, 0" ", 1, 1, 1")
add_products(__nv_fp8_e4m3 f32.e4m3.e4m3 32 float f ", 1, 1" ", 1, 1")
add_products(std::int8_t s32.s8.s8 32 int r "" "")
string(APPEND text "\n}  // namespace ditattn::kernels::cuda\n")
file(WRITE ${OUTPUT} "${text}")
