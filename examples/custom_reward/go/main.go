// Command vowels is a reward service in Go: it rewards completions for their vowels.
//
//	vowels [HOST:PORT]
//
// REWARD_TOKEN: bearer token that callers must have. TLS_CERT and TLS_KEY: PEM files, for TLS.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "example.org/vowels/surogatev1"
)

const (
	environment = "vowels"
	service     = "surogate.v1.RewardService"
	// gRPC's default of 4 MiB is too little for large groups.
	maxMessageBytes    = 64 << 20
	defaultItemTimeout = 30 * time.Second
	drainTime          = 10 * time.Second
)

// knownArgs: the orchestrator reads dataset; it comes with the others.
var knownArgs = map[string]bool{"dataset": true}

// reward is the share of vowels among the letters. Replace it: it may take its time, until ctx ends.
func reward(_ context.Context, completion string) (float64, error) {
	letters, vowels := 0, 0
	for _, char := range completion {
		if unicode.IsLetter(char) {
			letters++
			if strings.ContainsRune("aeiouAEIOU", char) {
				vowels++
			}
		}
	}
	if letters == 0 {
		return 0, errors.New("no letters in the completion")
	}
	return float64(vowels) / float64(letters), nil
}

type rewardServer struct {
	pb.UnimplementedRewardServiceServer
}

// ListEnvironments says what there is.
func (*rewardServer) ListEnvironments(
	context.Context, *pb.ListEnvironmentsRequest,
) (*pb.ListEnvironmentsResponse, error) {
	vowels := &pb.Environment{
		Id:            environment,
		Description:   "Share of vowels among the letters.",
		MinReward:     proto.Float64(0),
		MaxReward:     proto.Float64(1),
		Deterministic: true,
		Version:       "1",
	}
	return &pb.ListEnvironmentsResponse{Environments: []*pb.Environment{vowels}}, nil
}

// ScoreRollouts answers every rollout, in order, by a score or an error.
func (*rewardServer) ScoreRollouts(
	ctx context.Context, request *pb.ScoreRolloutsRequest,
) (*pb.ScoreRolloutsResponse, error) {
	if request.GetEnvironment() != environment {
		return nil, status.Errorf(codes.NotFound, "no environment %q; there is %s", request.GetEnvironment(), environment)
	}
	for key := range request.GetArgs().GetFields() {
		if !knownArgs[key] {
			return nil, status.Errorf(codes.InvalidArgument, "env[].args.%s: unknown argument", key)
		}
	}
	timeout := defaultItemTimeout
	if request.GetItemTimeout() != nil {
		timeout = request.GetItemTimeout().AsDuration()
	}
	results := make([]*pb.RolloutResult, len(request.GetRollouts()))
	var scoring sync.WaitGroup
	for index, rollout := range request.GetRollouts() {
		scoring.Add(1)
		go func(index int, rollout *pb.Rollout) {
			defer scoring.Done()
			results[index] = score(ctx, rollout, timeout)
		}(index, rollout)
	}
	scoring.Wait()
	return &pb.ScoreRolloutsResponse{Results: results}, nil
}

// score is the result for one rollout: what cannot be scored, or not in time, is an error, never a reward of 0.
func score(ctx context.Context, rollout *pb.Rollout, timeout time.Duration) *pb.RolloutResult {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	result := &pb.RolloutResult{RolloutId: rollout.GetRolloutId()}
	done := make(chan struct{})
	var value float64
	var err error
	go func() {
		defer close(done)
		defer func() {
			if cause := recover(); cause != nil {
				err = fmt.Errorf("scoring failed: %v", cause)
			}
		}()
		value, err = reward(ctx, rollout.GetCompletion())
	}()
	select {
	case <-ctx.Done():
		return failed(result, codes.DeadlineExceeded, fmt.Sprintf("scoring took longer than %s", timeout))
	case <-done:
	}
	if err != nil {
		return failed(result, codes.InvalidArgument, err.Error())
	}
	result.Outcome = &pb.RolloutResult_Score{Score: &pb.Score{Reward: value}}
	return result
}

func failed(result *pb.RolloutResult, code codes.Code, message string) *pb.RolloutResult {
	result.Outcome = &pb.RolloutResult_Error{Error: &rpcstatus.Status{Code: int32(code), Message: message}}
	return result
}

// checkToken refuses calls of the reward service without the token; health and reflection are open.
func checkToken(token string) grpc.UnaryServerInterceptor {
	return func(
		ctx context.Context, request interface{}, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
	) (interface{}, error) {
		if token != "" && strings.HasPrefix(info.FullMethod, "/"+service+"/") {
			given, _ := metadata.FromIncomingContext(ctx)
			if values := given.Get("authorization"); len(values) != 1 || values[0] != "Bearer "+token {
				return nil, status.Error(codes.Unauthenticated, "no token, or a wrong one")
			}
		}
		return handler(ctx, request)
	}
}

func options() ([]grpc.ServerOption, error) {
	found := []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxSendMsgSize(maxMessageBytes),
		grpc.UnaryInterceptor(checkToken(os.Getenv("REWARD_TOKEN"))),
	}
	if cert, key := os.Getenv("TLS_CERT"), os.Getenv("TLS_KEY"); cert != "" && key != "" {
		tls, err := credentials.NewServerTLSFromFile(cert, key)
		if err != nil {
			return nil, err
		}
		found = append(found, grpc.Creds(tls))
	}
	return found, nil
}

func run(address string) error {
	chosen, err := options()
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer(chosen...)
	pb.RegisterRewardServiceServer(server, &rewardServer{})
	healthy := health.NewServer()
	healthy.SetServingStatus(service, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(server, healthy)
	reflection.Register(server)

	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-ended
		healthy.Shutdown()
		time.AfterFunc(drainTime, server.Stop)
		server.GracefulStop()
	}()
	fmt.Printf("listening on port %d\n", listener.Addr().(*net.TCPAddr).Port)
	return server.Serve(listener)
}

func main() {
	address := "127.0.0.1:50080"
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	if err := run(address); err != nil {
		log.Fatal(err)
	}
}
