// A reward service in TypeScript: rewards completions for their vowels.
//
//   node dist/server.js [HOST:PORT]
//
// REWARD_TOKEN: bearer token that callers must have. TLS_CERT and TLS_KEY: PEM files, for TLS. PROTO_ROOT: folder of the
// contract, by default this repository's proto/.
import { readFileSync } from "node:fs";
import path from "node:path";

import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";
import { ReflectionService } from "@grpc/reflection";
import { getProtoPath } from "google-proto-files";
import { HealthImplementation } from "grpc-health-check";

const ENVIRONMENT = {
  id: "vowels",
  description: "Share of vowels among the letters.",
  min_reward: 0,
  max_reward: 1,
  deterministic: true,
  version: "1",
};
const KNOWN_ARGS = new Set(["dataset"]); // the orchestrator reads it; it comes with the others
const MAX_MESSAGE_BYTES = 64 * 2 ** 20; // gRPC's default of 4 MiB is too little for large groups
const DEFAULT_ITEM_SECONDS = 30;

interface Rollout {
  rollout_id: string;
  completion: string;
}

interface ScoreRolloutsRequest {
  environment: string;
  args: { fields: Record<string, unknown> } | null;
  rollouts: Rollout[];
  item_timeout: { seconds: number; nanos: number } | null;
}

type RolloutResult = { rollout_id: string } & (
  | { score: { reward: number; components?: Record<string, number> } }
  | { error: { code: grpc.status; message: string } }
);

class Failure extends Error {
  constructor(
    readonly code: grpc.status,
    message: string,
  ) {
    super(message);
  }
}

/** Share of vowels among the letters. Replace it: it may take its time, and await other services. */
async function reward(completion: string): Promise<number> {
  const letters = completion.match(/\p{L}/gu);
  if (letters === null) throw new Failure(grpc.status.INVALID_ARGUMENT, "no letters in the completion");
  return letters.filter((letter) => "aeiouAEIOU".includes(letter)).length / letters.length;
}

/** What cannot be scored, or not in time, is an error of this rollout, never a reward of 0. */
async function result(rollout: Rollout, milliseconds: number): Promise<RolloutResult> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    const failure = new Failure(grpc.status.DEADLINE_EXCEEDED, `scoring took longer than ${milliseconds} ms`);
    timer = setTimeout(() => reject(failure), milliseconds);
  });
  try {
    // A reward that computes for long belongs in a worker thread: no timer runs while this one is busy.
    const score = { reward: await Promise.race([reward(rollout.completion), late]) };
    return { rollout_id: rollout.rollout_id, score };
  } catch (error) {
    const code = error instanceof Failure ? error.code : grpc.status.INTERNAL;
    return { rollout_id: rollout.rollout_id, error: { code, message: String((error as Error).message) } };
  } finally {
    clearTimeout(timer);
  }
}

async function scoreRollouts(request: ScoreRolloutsRequest): Promise<{ results: RolloutResult[] }> {
  if (request.environment !== ENVIRONMENT.id) {
    const message = `no environment "${request.environment}"; there is ${ENVIRONMENT.id}`;
    throw new Failure(grpc.status.NOT_FOUND, message);
  }
  const unknown = Object.keys(request.args?.fields ?? {}).find((key) => !KNOWN_ARGS.has(key));
  if (unknown !== undefined) {
    throw new Failure(grpc.status.INVALID_ARGUMENT, `env[].args.${unknown}: unknown argument`);
  }
  const { seconds, nanos } = request.item_timeout ?? { seconds: DEFAULT_ITEM_SECONDS, nanos: 0 };
  const milliseconds = Math.max(1, seconds * 1000 + nanos / 1e6);
  // Promise.all keeps the order of the request.
  return { results: await Promise.all(request.rollouts.map((rollout) => result(rollout, milliseconds))) };
}

/** A handler of one call: checks the token, and answers a status for what is thrown. */
function unary<Request, Response>(
  answer: (request: Request) => Promise<Response>,
): grpc.handleUnaryCall<Request, Response> {
  const token = process.env.REWARD_TOKEN;
  return (call, callback) => {
    if (token && call.metadata.get("authorization")[0] !== `Bearer ${token}`) {
      callback({ code: grpc.status.UNAUTHENTICATED, details: "no token, or a wrong one" });
      return;
    }
    answer(call.request).then(
      (response) => callback(null, response),
      (error: Error) => {
        const code = error instanceof Failure ? error.code : grpc.status.INTERNAL;
        callback({ code, details: error.message });
      },
    );
  };
}

function credentials(): grpc.ServerCredentials {
  const { TLS_CERT, TLS_KEY } = process.env;
  if (!TLS_CERT || !TLS_KEY) return grpc.ServerCredentials.createInsecure();
  return grpc.ServerCredentials.createSsl(null, [
    { cert_chain: readFileSync(TLS_CERT), private_key: readFileSync(TLS_KEY) },
  ]);
}

function main(): void {
  const contract = protoLoader.loadSync("surogate/v1/reward.proto", {
    includeDirs: [
      process.env.PROTO_ROOT ?? path.resolve(__dirname, "../../../../proto"),
      path.dirname(getProtoPath()), // google/rpc/status.proto
    ],
    keepCase: true,
    longs: Number,
    enums: String,
    defaults: true,
  });
  const service = contract["surogate.v1.RewardService"] as protoLoader.ServiceDefinition;
  const server = new grpc.Server({
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
  });
  server.addService(service, {
    ListEnvironments: unary(async () => ({ environments: [ENVIRONMENT] })),
    ScoreRollouts: unary(scoreRollouts),
  });
  new HealthImplementation({ "": "SERVING", "surogate.v1.RewardService": "SERVING" }).addToServer(server);
  new ReflectionService(contract).addToServer(server);

  server.bindAsync(process.argv[2] ?? "127.0.0.1:50080", credentials(), (error, port) => {
    if (error !== null) throw error;
    console.log(`listening on port ${port}`);
  });
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    process.once(signal, () => {
      const force = setTimeout(() => server.forceShutdown(), 10_000);
      server.tryShutdown(() => clearTimeout(force));
    });
  }
}

main();
