-- wrk's part of the load: posts the files named behind `--` by turns, and says at the end what came of it.
--
-- A connection sends again at once when it is answered, so the calls of `request` tell when answers came. The pace is
-- taken from the first sending to the last answer: where batches of images take a second, what wrk counts by the end
-- of its time depends on whether one was nearly done.

local ffi = require("ffi")
ffi.cdef [[
  typedef struct { long seconds; long nanoseconds; } moment;
  int clock_gettime(int clock, moment *now);
]]
local moment = ffi.new("moment")
local requests = {}
local turn = 0
local thread_of_load

-- Global, because wrk reads no locals of its threads.
sent, first, last = 0, 0, 0

function setup(thread)
  thread_of_load = thread
end

function init(args)
  for place = 1, #args do
    local file = assert(io.open(args[place], "rb"))
    local body = file:read("*a")
    file:close()
    requests[place] = wrk.format("POST", nil, {["Content-Type"] = "application/octet-stream"}, body)
  end
end

function request()
  ffi.C.clock_gettime(1, moment)
  last = tonumber(moment.seconds) + tonumber(moment.nanoseconds) / 1e9
  sent = sent + 1
  if sent == 2 then first = last end  -- the very first is wrk's own look at what will be sent
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.6f, "refused": %d, "broken": %d, "p50_ms": %.3f, "p99_ms": %.3f,'
      .. ' "sent": %d, "sending_s": %.6f}\n',
    summary.requests, summary.duration / 1e6, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    thread_of_load:get("sent") - 1, thread_of_load:get("last") - thread_of_load:get("first")))
end
