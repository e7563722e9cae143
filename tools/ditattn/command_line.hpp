#pragma once

#include "ditattn/export.hpp"

/// Runs the command line and returns its exit status; nothing is thrown. The one export of libditattn_command.so, which
/// the program `ditattn` and `python -m ditattn` share.
extern "C" DITATTN_API int ditattn_command(int argc, char** argv);
