#!/bin/sh
# Run user-mode Linux with the arguments after the first, which is a directory to write to.
set -eu
directory=$1
shift
if grep -qw amx_tile /proc/cpuinfo; then
  cc -O2 -Wall -shared -fPIC -o "$directory/wide_registers.so" "$(dirname "$0")/wide_registers.c"
  export LD_PRELOAD="$directory/wide_registers.so"
fi
exec linux.uml "$@"
