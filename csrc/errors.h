// errors.h - refusals in words, for any file: of torch it needs next to nothing, and that compiles fast.
#pragma once
#include <torch/headeronly/util/Exception.h>

#define RELPOS_CHECK(condition, ...) STD_TORCH_CHECK(condition, "relpos_cuda: ", __VA_ARGS__)
