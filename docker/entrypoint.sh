#!/usr/bin/env bash
# Run a command in the container. If SSHD_PORT is set, first start an sshd there, so that hosts of a hostfile reach one
# another: a container per host, with the same id_ed25519 and authorized_keys mounted at /ssh. No root is needed.
set -euo pipefail

if [ -n "${SSHD_PORT:-}" ]; then
  install -d -m 700 ~/.ssh
  install -m 600 /ssh/id_ed25519 /ssh/authorized_keys ~/.ssh/
  # Containers that are started anew have new host keys; only holders of the mounted key can log in.
  printf 'Host *\n  Port %s\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n' \
    "$SSHD_PORT" > ~/.ssh/config
  rm -f ~/.ssh/host_key ~/.ssh/host_key.pub
  ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/host_key
  # Sessions have no environment of the image otherwise, and so would not find python.
  /usr/sbin/sshd -f /dev/null -p "$SSHD_PORT" -h ~/.ssh/host_key -o PidFile=none -o UsePAM=no \
    -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o MaxStartups=1024 -o "SetEnv=PATH=$PATH"
fi
exec "$@"
