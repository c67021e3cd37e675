// The kernels for any machine of this architecture: SSE2 on x86-64, NEON on aarch64.

#if defined(__aarch64__)
#define LOWBIT_ISA_NAME "neon"
#else
#define LOWBIT_ISA_NAME "baseline"
#endif
#define LOWBIT_ISA baseline
#include "kernels/all.inc.hpp"

namespace lowbit {

const Kernels* baseline_kernels() { return &kTable; }

}  // namespace lowbit
