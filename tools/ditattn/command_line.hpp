#pragma once

namespace ditattn::cli {

/// The whole command line: parses, does, reports errors on stderr, returns the exit status. Throws nothing.
int run_command_line(int argc, char** argv);

}  // namespace ditattn::cli
