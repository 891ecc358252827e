// One kernel of adapter_residual by itself: what it is built of is changed to see that the change is noticed.
#include "adapter_residual.cuh"

#include "launch.h"
#include "tests.h"

namespace pyfused {
namespace {

using Block = Bottleneck<bfloat16, 64, 2>;

Rows rows_of(const Matrix& matrix) {
  Rows rows{matrix.data, Number::kBFloat16};
  rows.stride_l = matrix.pitch;
  rows.stride_c = 1;
  rows.stride_b = int64_t{matrix.rows} * matrix.pitch;
  return with_access(rows);
}

}  // namespace

void adapter_forward(const Matrix& z, const Matrix& down, const Matrix& up, const Matrix& y, const Matrix& hidden,
                     int stages) {
  AdapterForward p{};
  p.z = p.residual = rows_of(z);
  p.down = rows_of(down);
  p.up = rows_of(up);
  p.z_is_residual = true;
  p.y = rows_of(y);
  p.hidden = rows_of(hidden);
  p.batch = 1;
  p.length = z.rows;
  p.per_sample = 1;
  p.channels = z.columns;
  p.width = down.rows;
  p.activation.slope = 1.0f;  // identity
  p.number = Number::kBFloat16;
  p.tiles_l = (z.rows + Block::kRows - 1) / Block::kRows;
  p.stages = stages;
  launch<adapter_fwd_kernel<Block>>(dim3(p.tiles_l), Block::kThreads, Block::shared_bytes(z.columns, stages), nullptr,
                                    p);
}

}  // namespace pyfused
