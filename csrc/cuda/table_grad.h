// table_grad.h - the gradient of the table, of both ops: kernels in table_grad.cuh.
#pragma once
#include <optional>

#include "device.h"

namespace relpos {

// dtable and the work spaces of the kernels below.
void check_table_gradient(const Shape& s, const Tensor& q, const Tensor& dtable, const std::optional<Tensor>& factors,
                          const std::optional<Tensor>& partials);

// From the gradient of the factors [rows, factors]; partials [splits, pairs of coordinates, D].
void launch_table_gradient(const OnDevice& device, const Shape& s, const QueryStrides& strides, const Tensor& q,
                           const Tensor& index, const Tensor& factors, const Tensor& partials, Tensor& dtable);

}  // namespace relpos
