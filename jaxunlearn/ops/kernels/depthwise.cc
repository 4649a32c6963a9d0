// Depthwise convolution of an image as it is read through BatchNorm and ReLU, and its gradients.
//
// Bound by memory, which is at its best when it is passed over in order: 73 to 90 GB/s, against 30 to 55 where sixteen
// channels of every pixel come first, then the next. So arrays are read and written row by row, all channels of a pixel
// together; between, rows lie in the cache by blocks of a vector of channels, for which the sums run.

#include "depthwise_rows.h"

namespace {

template <class E>
void ForwardImage(const Layer& s, const Reading& read, Ring& z, const E* x, E* y, E* scratch, Moments& own) {
  int ready = 0, strip = Strip(s.out_width, s.out_height);
  auto convolve = [&](int oy, int rows) {
    Next next(x + ready * s.row(), rows * s.stride * s.row() * sizeof(E), s.blocks * rows * s.out_width);
    if (s.size == 3) Convolve<3>(s, z, oy, rows, scratch, next, own);
    else Convolve<0>(s, z, oy, rows, scratch, next, own);
  };
  for (int oy = 0; oy < s.out_height; oy += strip) {
    int rows = std::min(strip, s.out_height - oy);
    for (; ready < std::min(s.height, (oy + rows - 1) * s.stride - s.pad + s.size); ready++)
      FillRow(z, ready, s.width, s.channels, [&read, row = x + ready * s.row()](int c, auto lanes) {
        return [=, normal = read.At(c)](size_t at) { return normal(lanes.Get(row + at)); };
      });
    if (own.count == 0) {  // no mean to start from: the first row's
      convolve(0, 1);
      own.count = 0;
      std::fill_n(own.squares, s.channels, 0.f);
    }
    convolve(oy, rows);
    Stream(y + oy * s.out_row(), scratch, rows * s.out_row() * sizeof(E));
  }
}

template <class E>
ffi::Error Forward(ffi::ThreadPool pool, int64_t stride, int64_t reading, ArrayOf<E> x, Array mean, Array factor,
                   Array bias, Array kernel, ResultOf<E> y, Result ymean, Result yvar) {
  Layer s(x.dimensions(), stride, kernel);
  Reading read(reading, s.channels, mean, factor, bias);
  const E* from = Data<const E>(x);
  E* to = Data<E>(*y);
  std::vector<float> moments((size_t)kGroups * 2 * s.channels);
  int counts[kGroups];
  ParallelFor(pool, kGroups, [&](int group) FLAT {
    int strip = Strip(s.out_width, s.out_height);
    Ring z(s, strip * s.stride + s.size, s.height, s.width);
    std::vector<E> scratch(strip * s.out_row());
    Moments own{0, moments.data() + (size_t)group * 2 * s.channels};
    own.squares = own.mean + s.channels;
    for (int b = group * s.batch / kGroups; b < (group + 1) * s.batch / kGroups; b++)
      ForwardImage(s, read, z, from + b * s.height * s.row(), to + b * s.out_height * s.out_row(), scratch.data(), own);
    counts[group] = own.count;
  });
  MergeMoments(kGroups, [&](int group) { return counts[group]; }, moments.data(), s.channels, s.channels,
               ymean->typed_data(), yvar->typed_data());
  return ffi::Error::Success();
}

template <class E>
void BackwardImage(const Layer& s, const Reading& read, const OutputGradient& gradient, Ring& g, const E* x, const E* y,
                   const E* gy, E* gx, E* scratch, const Gradients& gradients) {
  int ready = 0, strip = Strip(s.width, s.height);
  for (int iy = 0; iy < s.height; iy += strip) {
    int rows = std::min(strip, s.height - iy);
    for (; ready < std::min(s.out_height, (iy + rows - 1 + s.pad) / s.stride + 1); ready++)
      FillRow(g, ready, s.out_width, s.channels, [&, first = ready * s.out_row()](int f, auto lanes) {
        return [=, handed = gradient.At(f)](size_t at) {
          return handed(lanes.Get(gy + first + at), lanes.Get(y + first + at));
        };
      });
    int phases = std::min(s.stride, rows) * std::min(s.stride, s.width), phase = 0;
    size_t out = ready * s.out_row(), bytes = rows * s.out_row() * sizeof(E) / s.stride;
    for (int i = 0; i < std::min(s.stride, rows); i++)
      for (int j = 0; j < std::min(s.stride, s.width); j++) {
        auto run = [&]<int R, int T>() {
          size_t begin = i * s.row();
          size_t lines = (rows - i + s.stride - 1) / s.stride, pixels = (s.width - j + s.stride - 1) / s.stride;
          auto part = [&](const E* from, size_t bytes) {
            return Next((const char*)from + bytes / phases * phase, bytes / phases, s.blocks * lines * pixels);
          };
          Next next[] = {part(y + out, bytes), part(gy + out, bytes),
                         part(x + (iy + rows) * s.row(), rows * s.row() * sizeof(E))};
          const E* from = x + iy * s.row() + begin;
          AddGradients<R, T>(s, read, g, iy + i, rows - i, j, from, scratch + begin, next, gradients);
          phase++;
        };
        int lines = Along(iy + i, s).count, taps = Along(j, s).count;
        if (lines == 3 && taps == 3) run.template operator()<3, 3>();
        else if (lines == 1 && taps == 1) run.template operator()<1, 1>();
        else if (lines == 1 && taps == 2) run.template operator()<1, 2>();
        else if (lines == 2 && taps == 1) run.template operator()<2, 1>();
        else if (lines == 2 && taps == 2) run.template operator()<2, 2>();
        else run.template operator()<0, 0>();
      }
    Stream(gx + iy * s.row(), scratch, rows * s.row() * sizeof(E));
  }
}

template <class E>
ffi::Error Backward(ffi::ThreadPool pool, int64_t stride, int64_t reading, ArrayOf<E> x, Array mean, Array factor,
                    Array bias, Array kernel, ArrayOf<E> y, Array ymean, ArrayOf<E> gy, Array gmean, Array gvar,
                    ResultOf<E> gx, Result gfactor, Result gbias, Result gkernel) {
  Layer s(x.dimensions(), stride, kernel);
  Reading read(reading, s.channels, mean, factor, bias);
  OutputGradient gradient(s.out_pixels(), ymean, gmean, gvar);
  const E *xs = Data<const E>(x), *ys = Data<const E>(y), *gys = Data<const E>(gy);
  E* to = Data<E>(*gx);
  size_t channels = s.channels, taps = s.size * s.size;
  std::vector<float> sums((taps + 2) * channels);
  SumOfGroups(pool, sums.size(), sums.data(), [&](int group, float* own) FLAT {
    Gradients gradients{own, own + taps * channels, own + (taps + 1) * channels};
    int strip = Strip(s.width, s.height);
    Ring g(s, strip + s.size, s.out_height, s.out_width);
    std::vector<E> scratch(strip * s.row());
    for (int b = group * s.batch / kGroups; b < (group + 1) * s.batch / kGroups; b++) {
      size_t image = b * s.height * s.row(), out = b * s.out_height * s.out_row();
      BackwardImage(s, read, gradient, g, xs + image, ys + out, gys + out, to + image, scratch.data(), gradients);
    }
  });
  std::copy_n(sums.data(), taps * channels, gkernel->typed_data());
  read.Put(&sums[taps * channels], &sums[(taps + 1) * channels], channels, gfactor->typed_data(), gbias->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_forward, Forward<float>, FORWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_backward, Backward<float>, BACKWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_forward_bf16, Forward<BFloat16>, FORWARD(BFloat16));
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_backward_bf16, Backward<BFloat16>, BACKWARD(BFloat16));
