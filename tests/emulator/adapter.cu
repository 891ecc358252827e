// One kernel of adapter_residual by itself: what it is built of is changed to see that the change is noticed.
#include "adapter_residual.cuh"

#include "entry.h"
#include "launch.h"

namespace pyfused {
namespace {

using Block = Bottleneck<bfloat16, 64, 2>;

/// A matrix whose rows start at multiples of 16 bytes.
Rows exposed(void* data, int64_t rows, int64_t columns, bool writable = false) {
  Rows matrix{data, Number::kBFloat16};
  matrix.stride_l = (columns + 7) / 8 * 8;
  matrix.stride_c = 1;
  matrix.stride_b = rows * matrix.stride_l;
  emulator::expose(data, 2 * ((rows - 1) * matrix.stride_l + columns), writable);
  return with_access(matrix);
}

}  // namespace

/// y = z + (z D^T) U^T, and z D^T; the message of what went wrong.
extern "C" const char* adapter_forward(void* z, void* down, void* up, void* y, void* hidden, int rows, int channels,
                                       int width, int stages) {
  return message_of([=] {
    AdapterForward p{};
    p.z = p.residual = exposed(z, rows, channels);
    p.down = exposed(down, width, channels);
    p.up = exposed(up, channels, width);
    p.z_is_residual = true;
    p.y = exposed(y, rows, channels, true);
    p.hidden = exposed(hidden, rows, width, true);
    p.batch = 1;
    p.length = rows;
    p.per_sample = 1;
    p.channels = channels;
    p.width = width;
    p.activation.slope = 1.0f;  // identity
    p.number = Number::kBFloat16;
    p.tiles_l = (rows + Block::kRows - 1) / Block::kRows;
    p.stages = stages;
    launch<adapter_fwd_kernel<Block>>(dim3(p.tiles_l), Block::kThreads, Block::shared_bytes(channels, stages), nullptr,
                                      p);
  });
}

}  // namespace pyfused
