// The subcommands. Each parses its own arguments (argv[0] is its name) and returns when its work is done on this rank.
#ifndef TS_COMMANDS_H
#define TS_COMMANDS_H

#include "launcher/launch.h"

ts_status ts_command_run(ts_launch *launch, int argc, char **argv);
ts_status ts_command_eval(ts_launch *launch, int argc, char **argv);
ts_status ts_command_logits(ts_launch *launch, int argc, char **argv);
ts_status ts_command_inspect(ts_launch *launch, int argc, char **argv);
ts_status ts_command_show(ts_launch *launch, int argc, char **argv);
ts_status ts_command_bench(ts_launch *launch, int argc, char **argv);

#endif
