#include "tools/ditattn/command_line.hpp"

int main(int argc, char** argv) { return ditattn::cli::run_command_line(argc, argv); }
