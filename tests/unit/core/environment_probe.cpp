// Prints AT_SECURE, the kernel's word on whether this runs as a set-user-ID program or the like, and the library's
// variables as it sees them. A program of its own, so that a test can give it the bit; it links to no library of ours,
// because the dynamic linker finds none by $ORIGIN then.

#include <sys/auxv.h>

#include <cstdio>

#include "core/environment.hpp"

int main() {
  std::printf("%lu", ::getauxval(AT_SECURE));
  for (std::size_t i = 0; i < ditattn::environment_variables().size(); ++i) {
    std::printf(" %s", ditattn::environment(static_cast<ditattn::Env>(i)).value_or("-").c_str());
  }
}
