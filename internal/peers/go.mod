module github.com/tcprelay/relay/internal/peers

go 1.26.0

require (
	github.com/coder/websocket v1.8.15
	github.com/hashicorp/yamux v0.1.2
	github.com/inconshreveable/muxado v0.0.0-20160802230925-fc182d90f26e
	github.com/tcprelay/relay v0.0.0
	github.com/xtaci/smux v1.5.56
	golang.ngrok.com/muxado/v2 v2.0.2
	golang.org/x/net v0.62.0
)

replace github.com/tcprelay/relay => ../..
