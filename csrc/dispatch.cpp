#include "dispatch.hpp"

#include <stdexcept>

namespace lowbit {

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> available;
    for (const Kernels* candidate : {avx512_kernels(), avx2_kernels(), baseline_kernels()})
        if (candidate) available.push_back(candidate);
    return available;
}

const Kernels& kernels_named(const std::string& isa) {
    std::string names;
    for (const Kernels* candidate : available_kernels()) {
        if (isa == candidate->isa) return *candidate;
        names += names.empty() ? candidate->isa : std::string(", ") + candidate->isa;
    }
    throw std::invalid_argument("instruction set '" + isa + "' is not available here (available: " + names + ")");
}

}  // namespace lowbit
