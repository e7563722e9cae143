#pragma once

#include <filesystem>

#include "ditattn/nccl.hpp"

namespace ditattn::parallel {

/// A file that others find an id in, for as long as this object lives. It is written elsewhere and linked, so that
/// nobody reads a part of it and no other is overwritten.
class IdFile {
 public:
  IdFile(std::filesystem::path file, const NcclId& id);
  ~IdFile();
  IdFile(const IdFile&) = delete;
  IdFile& operator=(const IdFile&) = delete;
  [[nodiscard]] const NcclId& id() const { return id_; }

 private:
  std::filesystem::path file_;
  NcclId id_;
};

/// The id, when it is there.
NcclId read_id(const std::filesystem::path& file, Seconds timeout);

}  // namespace ditattn::parallel
