#include "tools/ditattn/command_line.hpp"

int main(int argc, char** argv) { return ditattn_command(argc, argv); }
