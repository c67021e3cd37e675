// The kernels for AVX2. The file is compiled with -mavx2; without that flag there are none.

#if defined(__AVX2__)
#define LOWBIT_ISA_NAME "avx2"
#define LOWBIT_ISA avx2
#include "kernels/all.inc.hpp"

namespace lowbit {

const Kernels* avx2_kernels() { return __builtin_cpu_supports("avx2") ? &kTable : nullptr; }

}  // namespace lowbit

#else
#include "kernels.hpp"

namespace lowbit {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace lowbit
#endif
