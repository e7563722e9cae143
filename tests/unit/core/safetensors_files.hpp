#pragma once

/// A folder of its own for each test of safetensors files, and files written by hand.

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

namespace ditattn::testing {

class SafetensorsFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() /
              ("ditattn-" + std::string(info->name()) + "-" + std::to_string(::getpid()));
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  [[nodiscard]] const std::filesystem::path& folder() const { return folder_; }
  [[nodiscard]] std::filesystem::path file() const { return folder_ / "file.safetensors"; }

  /// Writes `bytes` as they are.
  void write_raw(const std::string& bytes) const { std::ofstream(file(), std::ios::binary) << bytes; }

  /// Writes a file of `header` and `data` whose length field says `length`.
  void write_with_length(std::uint64_t length, const std::string& header, const std::string& data = {}) const {
    std::string bytes;
    for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(length >> 8 * i & 0xFF));
    write_raw(bytes + header + data);
  }
  void write(const std::string& header, const std::string& data = {}) const {
    write_with_length(header.size(), header, data);
  }

 private:
  std::filesystem::path folder_;
};

}  // namespace ditattn::testing
