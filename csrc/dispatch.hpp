// Which instruction set runs. Chosen once, best first; a name can be forced, and an unknown one is an error.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace lowbit {

// Those that this library was built with and this machine can run, best first.
std::vector<const Kernels*> available_kernels();

// Throws std::invalid_argument, naming those available, where `isa` is not one of them.
const Kernels& kernels_named(const std::string& isa);

}  // namespace lowbit
