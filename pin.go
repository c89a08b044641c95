package relay

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// pinPrefix is what a pin begins with, as curl's --pinnedpubkey has it.
const pinPrefix = "sha256//"

// Pin returns what names the key of a certificate for [WithPin]: "sha256//" and the
// base64 of the SHA-256 of its SubjectPublicKeyInfo, which curl's --pinnedpubkey takes
// too. It stays the same for as long as the key does.
func Pin(cert *x509.Certificate) string {
	sum := keyHash(cert)
	return pinPrefix + base64.StdEncoding.EncodeToString(sum[:])
}

type pin [sha256.Size]byte

func keyHash(cert *x509.Certificate) pin { return sha256.Sum256(cert.RawSubjectPublicKeyInfo) }

// WithPin has the app register over TLS, at a relay that proves to have the key of one of
// the pins ([Pin]). Nothing else of its certificate counts, not its names, dates or who
// signed it, so that one the relay made by itself does. A second pin is for the key that
// the relay is to change to. A relay with another key fails the handshake (CodeTLS) before
// it is shown a token. What else [WithTLSConfig] sets, such as a client certificate, holds.
func WithPin(pins ...string) RegisterOption {
	return registerOption(func(c *registerConfig) error {
		if len(pins) == 0 {
			return errors.New("relay: WithPin: no pin")
		}
		c.pins = nil
		for _, s := range pins {
			encoded, ok := strings.CutPrefix(s, pinPrefix)
			sum, err := base64.StdEncoding.Strict().DecodeString(encoded)
			if !ok || err != nil || len(sum) != sha256.Size {
				return fmt.Errorf("relay: WithPin(%.100q): not %s and the base64 of a SHA-256", s, pinPrefix)
			}
			c.pins = append(c.pins, pin(sum))
		}
		return nil
	})
}

var errPin = errors.New("the relay does not have the key that it should")

// pinned returns a config in which the pins decide whether a relay is the right one.
func pinned(config *tls.Config, pins []pin) *tls.Config {
	if config == nil {
		config = &tls.Config{MinVersion: tls.VersionTLS13}
	}
	config = config.Clone()
	config.InsecureSkipVerify = true // by certification authorities; VerifyConnection is called all the same
	also := config.VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if cert := state.PeerCertificates[0]; !slices.Contains(pins, keyHash(cert)) { // a server has one
			return fmt.Errorf("%w: its pin is %s", errPin, Pin(cert))
		}
		if also != nil {
			return also(state)
		}
		return nil
	}
	return config
}
