#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "sampler.hpp"

namespace digits {

/// How far one backend's samples are from another's, on pixels 0 … 16.
struct Difference {
  double largest = 0;
  double psnr = 0;  ///< peak signal-to-noise ratio in dB; infinite for equal pictures
};

Difference compare(const Images& samples, const Images& reference);

/// One backend's samples and what stands above them.
struct Block {
  std::string name;
  std::string note;       ///< a second line; may be empty
  const Images& samples;  ///< must outlive the block
};

/// Draws the blocks one under the other, each under its name, one column per class under the class's number, and
/// writes them as a grey PNG (ditattn::FileError where that fails; a file of that name is then left as it was).
void save_picture(const std::filesystem::path& file, const ModelConfig& config, const std::vector<Block>& blocks);

}  // namespace digits
