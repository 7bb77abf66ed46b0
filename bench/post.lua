-- wrk's part of the load: posts the files named behind `--` by turns, and says at the end what came of it.

local requests = {}
local turn = 0

function init(args)
  for place = 1, #args do
    local file = assert(io.open(args[place], "rb"))
    local body = file:read("*a")
    file:close()
    requests[place] = wrk.format("POST", nil, {["Content-Type"] = "application/octet-stream"}, body)
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.6f, "refused": %d, "broken": %d, "p50_ms": %.3f, "p99_ms": %.3f}\n',
    summary.requests, summary.duration / 1e6, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
