// 3x3 convolution of stride 1 by Winograd's minimal filtering F(2x2, 3x3): 2.25 times fewer multiplications (Lavin &
// Gray, arXiv:1509.09308). A tile of 2x2 pixels of the output is A^T [(G k G^T) * (B^T d B)] A, with d the 4x4 pixels
// of the input around it; with channels the product in the middle is one of matrices [tiles, channels] x [channels,
// features] for each of sixteen positions. Chunks of tiles stay in a core's cache from transform to transform.
//
// Both gradients see the same transform of the output's gradient g: the kernel's is the correlation of g's 4x4 pixels
// with the input's 2x2, turned by half a circle. The input needs no margins for it.
//
// Channels and features must be multiples of 16.

#include "winograd_transforms.h"

namespace {

using namespace winograd;

constexpr int kBlock = 128;  // features from product to output transform
constexpr int kParts = 8;    // of the work, at least
constexpr int kRuns = 64;    // of chunks that follow each other, at most

// Where a tap of the kernel has fewer floats than kWide, groups of chunks add up gradients of their own, in a core's
// cache or near it. Otherwise kTogether tiles' chunks are transformed, then each position's product is added up over
// them by one thread: 128 channels of 16x16 took 21 ms or, when what one core writes was slow to reach the other, 35;
// in groups 20 at such a time.
constexpr size_t kWide = 256 * 256 + 1;
constexpr int kTogether = 128;

// Into how many shares of columns a part of the work is divided where there are few parts, and how wide they are.
struct Shares {
  int count, width;

  Shares(int parts, int columns) {
    int panels = (columns + kPanel - 1) / kPanel, wanted = (kParts + parts - 1) / parts;
    width = (panels + wanted - 1) / wanted * kPanel;
    count = (columns + width - 1) / width;
  }
};

template <int P>
void Forward(ffi::ThreadPool& pool, const Tiling& t, const Reading& read, const float* x, const float* kernel,
             int channels, int features, float* y, float* ymean, float* yvar) {
  Memory memory(P * P * KernelPosition(channels, features));
  float* kernels = memory.data();
  TransformKernel<P, false>(pool, kernel, channels, features, kernels);
  Layout layout(t.chunk * t.along, channels, P * P);
  std::vector<float> statistics((size_t)t.chunks * 2 * features);
  float* parts = statistics.data();
  int block = std::min(kBlock, features);
  size_t m_position = (size_t)t.chunk * t.along * block + 16;

  // Features begin ... end of a chunk.
  auto convolve = [&](int chunk, int begin, int end, bool follows) FLAT {
    float *rows = Scratch(1, 4 * (2 * t.along + 2) * channels), *v = Scratch(0, layout.chunk + P * P * m_position);
    float* m = v + layout.chunk;
    TransformInput<P>(t, layout, chunk, rows, v, [&](size_t pixel, int count, float* to) {
      const float* from = x + pixel * channels;
      for (int p = 0; p < count; p++, from += channels, to += channels)
        for (int c = 0; c < channels; c += kLanes) Store(to + c, read.At(c)(Load<Wide>(from + c)));
    });
    Ahead ahead(P * P, t.tiles(chunk), end - begin);
    if (follows) ahead.Read(x + t.first(chunk + 1) * channels, t.pixels(chunk + 1) * channels);
    if (end - begin == features) ahead.Write(y + t.first(chunk) * features, t.pixels(chunk) * features);
    float count = t.pixels(chunk);
    for (int f = begin; f < end; f += block) {
      int now = std::min(block, end - f);
      for (int p = 0; p < P * P; p++)
        Products(t.tiles(chunk), v + p * layout.position, layout.row, channels,
                 kernels + p * KernelPosition(channels, features), f, now, m + p * m_position, block, ahead);
      for (int i = 0; i < now; i += kLanes) {
        float* to = y + f + i;
        Wide sum = {}, squares[2] = {};
        TransformOutput<P>(t, chunk, m + i, block, m_position, [&](size_t pixel, Wide value) {
          Store(to + pixel * features, value);
          sum += value;
        });
        Wide mean = sum / count;
        for (int row = t.begin(chunk); row < t.end(chunk); row++) {
          const float* from = to + t.pixel(row) * features;
          for (int p = 0; p < (t.lower(row) ? 2 : 1) * t.width; p++, from += features) {
            Wide apart = Load<Wide>(from) - mean;
            squares[p & 1] += apart * apart;
          }
        }
        float* own = parts + (size_t)chunk * 2 * features + f + i;
        Store(own, mean);
        Store(own + features, squares[0] + squares[1]);
      }
    }
  };
  int runs = std::min(t.chunks, kRuns);
  Shares shares(runs, features);
  ParallelFor(pool, runs * shares.count, [&](int part) {
    int run = part / shares.count, from = part % shares.count * shares.width;
    int begin = (int64_t)t.chunks * run / runs, end = (int64_t)t.chunks * (run + 1) / runs;
    for (int chunk = begin; chunk < end; chunk++)
      convolve(chunk, from, std::min(features, from + shares.width), chunk + 1 < end);
  });
  MergeMoments(t.chunks, [=, &t](int chunk) { return t.pixels(chunk); }, parts, features, features, ymean, yvar);
}

template <int P>
void Backward(ffi::ThreadPool& pool, const Tiling& t, const Reading& read, const float* x, const float* kernel,
              const OutputGradient& gradient, const float* y, const float* gy, int channels, int features, float* gx,
              float* gfactor, float* gbias, float* gkernel) {
  Memory kernel_memory(P * P * KernelPosition(features, channels));
  float* kernels = kernel_memory.data();
  TransformKernel<P, true>(pool, kernel, channels, features, kernels);
  int tiles = t.chunk * t.along;
  Layout inputs(tiles, channels, P * P), outputs(tiles, features, P * P);
  std::vector<float> sums_of_chunks((size_t)t.chunks * 2 * channels);
  float* parts = sums_of_chunks.data();
  int block = std::min(kBlock, channels);
  size_t m_position = (size_t)tiles * block + 16;

  auto transform = [&](int chunk, float* v, float* z) FLAT {
    float* rows = Scratch(1, 4 * (2 * t.along + 2) * features);
    TransformInput<P>(t, outputs, chunk, rows, v, [&](size_t pixel, int count, float* to) {
      for (size_t at = pixel * features, end = at + (size_t)count * features; at < end; at += features, to += features)
        for (int f = 0; f < features; f += kLanes)
          Store(to + f, gradient.At(f)(Load<Wide>(gy + at + f), Load<Wide>(y + at + f)));
    });
    TransformPixels<P>(t, inputs, chunk, read, x, z);
  };
  auto input_gradient = [&](int chunk, const float* v, float* m, int begin, int end, Ahead& ahead) FLAT {
    if (end - begin == channels) ahead.Write(gx + t.first(chunk) * channels, t.pixels(chunk) * channels);
    for (int c = begin; c < end; c += block) {
      int now = std::min(block, end - c);
      for (int p = 0; p < P * P; p++)
        Products(t.tiles(chunk), v + p * outputs.position, outputs.row, features,
                 kernels + p * KernelPosition(features, channels), c, now, m + p * m_position, block, ahead);
      for (int i = 0; i < now; i += kLanes) {
        int at = c + i;
        Normal<Wide> normal = read.At(at);
        Wide biases = {}, factors = {};
        TransformOutput<P>(t, chunk, m + i, block, m_position, [&](size_t pixel, Wide value) {
          Wide centred = Load<Wide>(x + pixel * channels + at) - normal.mean;
          value = normal.Through(value, centred);
          Store(gx + pixel * channels + at, value * normal.factor);
          biases += value;
          factors += value * centred;
        });
        float* own = parts + (size_t)chunk * 2 * channels + at;
        Store(own, biases);
        Store(own + channels, factors);
      }
    }
  };

  bool wide = (size_t)channels * features >= kWide;
  int groups = wide ? 1 : std::min((size_t)channels * features < 128 * 128 ? kGroups : kParts, t.chunks);
  size_t position = (size_t)channels * features + 16;
  Memory sum_memory(groups * P * P * position);
  float* sums = sum_memory.data();
  if (!wide) {
    ParallelFor(pool, groups, [&](int group) {
      int begin = (int64_t)t.chunks * group / groups, end = (int64_t)t.chunks * (group + 1) / groups;
      float* v = Scratch(0, inputs.chunk + outputs.chunk + P * P * m_position);
      float *z = v + outputs.chunk, *m = z + inputs.chunk;
      for (int chunk = begin; chunk < end; chunk++) {
        transform(chunk, v, z);
        Ahead ahead(P * P, t.tiles(chunk), channels);
        if (chunk + 1 < end) {
          ahead.Read(x + t.first(chunk + 1) * channels, t.pixels(chunk + 1) * channels);
          ahead.Read(y + t.first(chunk + 1) * features, t.pixels(chunk + 1) * features);
          ahead.Read(gy + t.first(chunk + 1) * features, t.pixels(chunk + 1) * features);
        }
        input_gradient(chunk, v, m, 0, channels, ahead);
        for (int p = 0; p < P * P; p++)
          AddProducts(t.tiles(chunk), t.tiles(chunk), z + p * inputs.position, inputs, v + p * outputs.position,
                      outputs, chunk == begin, sums + (group * P * P + p) * position);
      }
    });
  } else {
    int together = std::min(std::max(1, kTogether / tiles), t.chunks);
    Memory transformed(together * (inputs.chunk + outputs.chunk));
    float *v = transformed.data(), *z = v + together * outputs.chunk;
    for (int begin = 0; begin < t.chunks; begin += together) {
      int count = std::min(together, t.chunks - begin);
      Shares shares(count, channels);
      ParallelFor(pool, count, [&](int i) { transform(begin + i, v + i * outputs.chunk, z + i * inputs.chunk); });
      ParallelFor(pool, count * shares.count + P * P, [&](int i) {
        if (i < count * shares.count) {
          int chunk = i / shares.count, from = i % shares.count * shares.width;
          int until = std::min(channels, from + shares.width);
          Ahead ahead(P * P, t.tiles(begin + chunk), until - from);
          input_gradient(begin + chunk, v + chunk * outputs.chunk, Scratch(0, P * P * m_position), from, until,
                         ahead);
        } else {
          int p = i - count * shares.count;
          AddProducts(t.tiles(begin, begin + count), tiles, z + p * inputs.position, inputs,
                      v + p * outputs.position, outputs, begin == 0, sums + p * position);
        }
      });
    }
  }

  TransformKernelGradient<P>(pool, sums, groups, position, channels, features, gkernel);
  for (int c = 0; c < channels; c++) {
    double biases = 0, factors = 0;
    for (int k = 0; k < t.chunks && read.any; k++) {
      biases += parts[(size_t)k * 2 * channels + c];
      factors += parts[(size_t)(2 * k + 1) * channels + c];
    }
    gbias[c] = biases;
    gfactor[c] = factors;
  }
}

ffi::Error Unsupported(int64_t stride, const Array& kernel) {
  auto d = kernel.dimensions();
  if (stride == 1 && d[0] == 3 && d[1] == 3 && d[2] % 16 == 0 && d[3] % 16 == 0) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("winograd: 3x3, stride 1, channels and features multiples of 16");
}

ffi::Error DispatchForward(ffi::ThreadPool pool, int64_t stride, int64_t reading, Array x, Array mean, Array factor,
                           Array bias, Array kernel, Result y, Result ymean, Result yvar) {
  if (auto error = Unsupported(stride, kernel); error.failure()) return error;
  Tiling t(x);
  int channels = kernel.dimensions()[2], features = kernel.dimensions()[3];
  Reading read(reading, channels, mean, factor, bias);
  auto run = t.down == 1 && t.along == 1 ? Forward<3> : Forward<4>;
  run(pool, t, read, x.typed_data(), kernel.typed_data(), channels, features, y->typed_data(), ymean->typed_data(),
      yvar->typed_data());
  return ffi::Error::Success();
}

ffi::Error DispatchBackward(ffi::ThreadPool pool, int64_t stride, int64_t reading, Array x, Array mean, Array factor,
                            Array bias, Array kernel, Array y, Array ymean, Array gy, Array gmean, Array gvar,
                            Result gx, Result gfactor, Result gbias, Result gkernel) {
  if (auto error = Unsupported(stride, kernel); error.failure()) return error;
  Tiling t(x);
  int channels = kernel.dimensions()[2], features = kernel.dimensions()[3];
  Reading read(reading, channels, mean, factor, bias);
  OutputGradient gradient((double)t.batch * t.height * t.width, ymean, gmean, gvar);
  auto run = t.down == 1 && t.along == 1 ? Backward<3> : Backward<4>;
  run(pool, t, read, x.typed_data(), kernel.typed_data(), gradient, y.typed_data(), gy.typed_data(), channels, features,
      gx->typed_data(), gfactor->typed_data(), gbias->typed_data(), gkernel->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(winograd_forward, DispatchForward, FORWARD(float));
XLA_FFI_DEFINE_HANDLER_SYMBOL(winograd_backward, DispatchBackward, BACKWARD(float));
