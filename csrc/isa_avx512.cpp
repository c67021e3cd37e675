// The kernels for AVX-512 F, BW, VL and DQ. The file is compiled with those flags; without them there are none.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LOWBIT_ISA_NAME "avx512"
#define LOWBIT_ISA avx512
#include "kernels/all.inc.hpp"

namespace lowbit {

const Kernels* avx512_kernels() {
    const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return supported ? &kTable : nullptr;
}

}  // namespace lowbit

#else
#include "kernels.hpp"

namespace lowbit {

const Kernels* avx512_kernels() { return nullptr; }

}  // namespace lowbit
#endif
