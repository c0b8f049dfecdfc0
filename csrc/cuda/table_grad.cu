// table_grad.cu - the gradient of the table: check, fill params, launch.
#include "dispatch.h"
#include "table_grad.cuh"
#include "table_grad.h"

namespace relpos {

void check_table_gradient(const Shape& s, const Tensor& q, const Tensor& dtable, const std::optional<Tensor>& factors,
                          const std::optional<Tensor>& partials) {
  check_buffer("dtable", dtable, q, ScalarType::Float, int64_t{s.table_rows()} * s.D);
  RELPOS_CHECK(factors && partials, "dtable needs the work spaces factors and partials");
  int64_t pairs = 0;
  for (const Axis& a : s.axis) pairs += a.rows ? static_cast<int64_t>(a.queries) * a.keys : 0;
  constexpr int64_t kMostSplits = 65535;  // the second axis of a grid
  RELPOS_CHECK(partials->dim() == 3 && partials->size(0) >= 1 && partials->size(0) <= kMostSplits &&
                   partials->size(1) == pairs && partials->size(2) == s.D,
               "partials must be [splits, ", pairs, ", ", s.D, "]");
  check_buffer("factors", *factors, q, ScalarType::Float, s.rows() * s.factors());
  check_buffer("partials", *partials, q, ScalarType::Float, partials->numel());
  RELPOS_CHECK(is_aligned(partials->const_data_ptr(), 16), "partials must start at a multiple of 16 bytes");
}

void launch_table_gradient(const OnDevice& device, const Shape& s, const QueryStrides& strides, const Tensor& q,
                           const Tensor& index, const Tensor& factors, const Tensor& partials, Tensor& dtable) {
  TableGradParams p;
  p.shape = s;
  p.q = {q.const_data_ptr(), strides.batch, strides.head, strides.row};
  p.whole_vectors_of_q = rows_are_aligned(p.q.data, strides, q.element_size());
  p.index = index.const_data_ptr<int32_t>();
  p.dfactors = factors.const_data_ptr<float>();
  p.partials = partials.mutable_data_ptr<float>();
  p.dtable = dtable.mutable_data_ptr<float>();
  p.pairs = partials.size(1);
  p.splits = static_cast<int>(partials.size(0));
  p.by_heads = FastDiv(s.heads);
  p.by_splits = FastDiv(p.splits);
  int coordinates = 0, most_keys = 0, inner = 1;
  for (int a = kAxes - 1; a >= 0; --a) {
    p.of_axis[a].by_inner = FastDiv(inner);
    const int64_t per_group = s.grid_queries() / s.axis[a].queries;
    p.of_axis[a].by_per_group = FastDiv(static_cast<int>(per_group));
    p.of_axis[a].per_split = round_up<int64_t>(ceil_div<int64_t>(s.groups * per_group, p.splits), kGradDepth);
    inner *= s.axis[a].queries;
    coordinates += s.axis[a].rows ? s.axis[a].queries : 0;
    most_keys = std::max(most_keys, s.axis[a].factors());
  }
  const bool mma = q.element_size() == 2 && s.D % 8 == 0;
  p.columns = grad_columns(mma, s.D);
  const int d_tiles = ceil_div(s.D, p.columns), tiles = ceil_div(most_keys, kProductRows) * d_tiles;
  p.by_tiles = FastDiv(tiles);
  p.by_d_tiles = FastDiv(d_tiles);
  dispatch_dtype(q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    auto kernel = table_partial_kernel<T, false>;
    if constexpr (sizeof(T) == 2)
      if (mma) kernel = table_partial_kernel<T, true>;
    device.launch(kernel, dim3(coordinates * tiles, p.splits), kThreads, table_partial_shared(mma, p.columns), p);
  });
  device.launch(table_sum_kernel, dim3(s.table_rows(), ceil_div(s.D, kSumColumns)), kThreads, sizeof(SumShared), p);
}

}  // namespace relpos
