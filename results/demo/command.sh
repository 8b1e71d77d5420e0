#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/../.."
bash launch/results.sh demo
